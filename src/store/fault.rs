//! Named points at which a test can end the process, as a power cut would: between any two steps that touch the disk.
//!
//! Debug builds only; in a release build [`point`] is nothing. `SLEDGE_FAULT=log.written:3` aborts when the point
//! `log.written` is reached for the third time.

/// Every point of a store, so that a test can go through all of them.
pub const POINTS: &[&str] = &[
    "log.append",
    "log.half_written",
    "log.written",
    "log.synced",
    "index.applied",
    "erase.begin",
    "erase.half_written",
    "erase.written",
    "meta.bloom_saved",
    "meta.written",
    "file.written",
    "file.renamed",
    "compact.begin",
    "compact.copied",
    "compact.caught_up",
    "compact.synced",
    "compact.switched",
    "generation.removed",
];

/// The points of a backup run, which no store passes.
pub const BACKUP_POINTS: &[&str] =
    &["backup.begin", "backup.stride", "backup.copied", "backup.in_force", "backup.erased", "backup.old_removed"];

/// The points of an index that is built again from the log, beside those of [`POINTS`] that it passes.
pub const REBUILD_POINTS: &[&str] =
    &["rebuild.begin", "rebuild.index_removed", "rebuild.index_made", "rebuild.replaying"];

/// The points of a request to vanish that takes more out than one write holds.
pub const VANISH_POINTS: &[&str] = &["vanish.portion"];

/// The points of a client's outbox.
pub const CLIENT_POINTS: &[&str] = &[
    "outbox.append",
    "outbox.half_written",
    "outbox.written",
    "outbox.synced",
    "outbox.cached",
    "outbox.sent",
    "outbox.answered",
    "outbox.shortened",
    "outbox.replaced",
];

#[cfg(debug_assertions)]
mod enabled {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// The point to die at, and how often it may still be passed.
    struct Fault {
        name: String,
        left: AtomicU64,
    }

    fn fault() -> Option<&'static Fault> {
        static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
        let read = || {
            let setting = std::env::var("SLEDGE_FAULT").ok()?;
            let (name, times) = setting.rsplit_once(':').unwrap_or((&setting, "1"));
            Some(Fault { name: name.to_owned(), left: AtomicU64::new(times.parse().ok()?) })
        };
        FAULT.get_or_init(read).as_ref()
    }

    /// Whether the process is to end here, now.
    pub fn is_due(name: &str) -> bool {
        debug_assert!(
            [super::POINTS, super::BACKUP_POINTS, super::REBUILD_POINTS, super::VANISH_POINTS, super::CLIENT_POINTS]
                .concat()
                .contains(&name),
            "{name} is not in the list of points"
        );
        fault().is_some_and(|fault| fault.name == name && fault.left.fetch_sub(1, Ordering::Relaxed) == 1)
    }

    /// Ends the process here if a test asked for it.
    pub fn point(name: &str) {
        if is_due(name) {
            std::process::abort();
        }
    }
}

#[cfg(not(debug_assertions))]
mod enabled {
    /// Never, in a release build.
    #[inline(always)]
    pub fn is_due(_name: &str) -> bool {
        false
    }

    /// Nothing, in a release build.
    #[inline(always)]
    pub fn point(_name: &str) {}
}

pub use enabled::{is_due, point};
