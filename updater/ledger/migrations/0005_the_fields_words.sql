-- Format 4 to 5: the field's words for tables, columns and reasons, and triggers for open_ratings.
-- Triggers and indexes whose text or name changes are made again, so that the result is what
-- schema.sql makes.

ALTER TABLE positions RENAME TO topic_partitions;
ALTER TABLE events RENAME COLUMN position TO topic_partition;
ALTER TABLE totals RENAME COLUMN position TO topic_partition;
ALTER TABLE interactions RENAME COLUMN position TO topic_partition;
ALTER TABLE feedback RENAME COLUMN position TO topic_partition;

DROP INDEX feedback_heads;
ALTER TABLE feedback RENAME COLUMN head TO latest;
CREATE UNIQUE INDEX feedback_latest ON feedback (interaction, rater, aspect) WHERE latest = 1;

ALTER TABLE tombstones RENAME TO erasure_markers;

DROP TRIGGER attempts_forgotten;
ALTER TABLE attempts RENAME TO crash_counts;
ALTER TABLE crash_counts RENAME COLUMN under_way TO in_update;
ALTER TABLE crash_counts RENAME COLUMN deaths TO crash_count;
ALTER TABLE crash_counts RENAME COLUMN alone TO crash_count_alone;
UPDATE crash_counts SET in_update = 'with_others' WHERE in_update = 'update';
CREATE TRIGGER crash_counts_forgotten AFTER DELETE ON interactions BEGIN
    DELETE FROM crash_counts WHERE interaction = OLD.id;
END;

ALTER TABLE releases RENAME COLUMN withdrawn TO revoked;

DROP INDEX erasures_to_replay;
ALTER TABLE erasures RENAME COLUMN clean_ancestor TO last_clean_version;
ALTER TABLE erasures RENAME COLUMN replay TO revoke;
ALTER TABLE erasures RENAME COLUMN restored_as TO revocation_version;
CREATE INDEX erasures_to_revoke ON erasures (id) WHERE revoke = 1 AND revocation_version IS NULL;

UPDATE feedback SET state = 'not_trainable' WHERE state = 'settled';

CREATE TRIGGER rating_opened AFTER UPDATE OF state ON feedback
WHEN OLD.state <> 'ready' AND NEW.state = 'ready' BEGIN
    UPDATE interactions SET open_ratings = open_ratings + 1 WHERE id = NEW.interaction;
END;
CREATE TRIGGER rating_closed AFTER UPDATE OF state ON feedback
WHEN OLD.state = 'ready' AND NEW.state <> 'ready' BEGIN
    UPDATE interactions SET open_ratings = open_ratings - 1 WHERE id = NEW.interaction;
END;

-- The trigger events_recounted moves the totals along; what it leaves at zero goes.
UPDATE events SET reason = CASE reason
    WHEN 'too_far' THEN 'off_policy'
    WHEN 'outranked_signal' THEN 'overridden_signal'
    WHEN 'release_withdrawn' THEN 'release_revoked'
    WHEN 'update_killed' THEN 'update_crashed' END
WHERE reason IN ('too_far', 'outranked_signal', 'release_withdrawn', 'update_killed');
DELETE FROM totals WHERE events = 0
    AND reason IN ('too_far', 'outranked_signal', 'release_withdrawn', 'update_killed');
UPDATE interactions SET untrainable = CASE untrainable
    WHEN 'too_far' THEN 'off_policy'
    WHEN 'outranked_signal' THEN 'overridden_signal'
    WHEN 'release_withdrawn' THEN 'release_revoked'
    WHEN 'update_killed' THEN 'update_crashed' END
WHERE untrainable IN ('too_far', 'outranked_signal', 'release_withdrawn', 'update_killed');
UPDATE decisions SET reason = CASE reason
    WHEN 'too_far' THEN 'off_policy'
    WHEN 'outranked_signal' THEN 'overridden_signal'
    WHEN 'release_withdrawn' THEN 'release_revoked'
    WHEN 'update_killed' THEN 'update_crashed' END
WHERE reason IN ('too_far', 'outranked_signal', 'release_withdrawn', 'update_killed');
UPDATE rejections SET reason = CASE reason
    WHEN 'too_far' THEN 'off_policy'
    WHEN 'outranked_signal' THEN 'overridden_signal'
    WHEN 'release_withdrawn' THEN 'release_revoked'
    WHEN 'update_killed' THEN 'update_crashed' END
WHERE reason IN ('too_far', 'outranked_signal', 'release_withdrawn', 'update_killed');

-- Nothing could set it but a test; the live version is the newest release.
DELETE FROM meta WHERE name = 'live_version';
