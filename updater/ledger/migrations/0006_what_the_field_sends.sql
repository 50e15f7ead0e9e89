-- Format 5 to 6.

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
