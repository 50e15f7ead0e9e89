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
