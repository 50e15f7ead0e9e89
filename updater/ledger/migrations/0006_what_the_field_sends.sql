-- Format 5 to 6.

-- Further names that a request gave the person whose reply it is.
CREATE TABLE other_users (
    user TEXT NOT NULL,                      -- moorline.events.user_digest
    interaction INTEGER NOT NULL,            -- interactions.id
    PRIMARY KEY (user, interaction)
) STRICT, WITHOUT ROWID;
CREATE INDEX other_users_by_interaction ON other_users (interaction);
CREATE TRIGGER other_users_erased AFTER UPDATE OF subject ON interactions
WHEN NEW.subject IS NULL BEGIN
    DELETE FROM other_users WHERE interaction = NEW.id;
END;
CREATE TRIGGER other_users_forgotten AFTER DELETE ON interactions BEGIN
    DELETE FROM other_users WHERE interaction = OLD.id;
END;

-- Ratings of a refused candidate wait for a smaller try.
CREATE TABLE refused_counts (
    interaction INTEGER PRIMARY KEY,         -- interactions.id
    refused INTEGER NOT NULL                 -- candidates that were refused with it
) STRICT;
CREATE TRIGGER refused_counts_forgotten AFTER DELETE ON interactions BEGIN
    DELETE FROM refused_counts WHERE interaction = OLD.id;
END;
ALTER TABLE rejections ADD COLUMN returned INTEGER NOT NULL DEFAULT 0;

-- The policies that somebody made the anchor of the line.
CREATE TABLE anchors (
    id INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,                -- 0: the base model
    reason TEXT NOT NULL,
    requested_by TEXT NOT NULL,
    requested_at REAL NOT NULL,
    applied_at REAL NOT NULL
) STRICT;

-- The keys that servers make pseudonyms with, as far as replies say.
CREATE TABLE pseudonym_keys (
    fingerprint TEXT PRIMARY KEY,
    last_arrival REAL NOT NULL               -- of a reply that names it, Unix seconds
) STRICT, WITHOUT ROWID;
