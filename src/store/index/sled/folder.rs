//! Which folder holds sled's database, and how it moves into a new one.
//!
//! A database whose write has failed for want of room reads nothing more that is not in memory, cannot be closed (sled ends
//! the process then) and so keeps its lock. Its files are as sound as after a crash. In another folder they can be opened
//! again, for the lock is on the folder; and the background work of the lost database, which knows the old path, finds
//! nothing there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// How every database's folder is called; behind it stands how often it has moved.
const NAME: &str = "sled";
/// sled locks this folder too.
const METADATA: &str = "metadata";
/// Moved last, so what has it is whole.
const SLABS: &str = "slabs";

/// The folder of the database in `dir`: the one that is whole, else the one to make. Others are what a move left behind.
pub(super) fn find(dir: &Path) -> PathBuf {
    let mut numbers: Vec<u32> = numbers(dir);
    numbers.sort_unstable();
    let whole = numbers.iter().rev().find(|number| path(dir, **number).join(SLABS).is_dir()).copied();
    let found = whole.unwrap_or(0);
    for other in numbers.into_iter().filter(|number| *number != found) {
        let _ = fs::remove_dir_all(path(dir, other)); // tried again at the next opening
    }
    path(dir, found)
}

/// Moves the database of `dir` from its present folder into a new one, and gives that.
///
/// # Errors
/// When a file cannot be moved; the database is then in pieces.
pub(super) fn move_on(dir: &Path, present: &Path) -> io::Result<PathBuf> {
    let number = numbers(dir).into_iter().max().unwrap_or(0) + 1;
    let new = path(dir, number);
    fs::create_dir_all(new.join(METADATA))?;
    move_all(&present.join(METADATA), &new.join(METADATA), |_| true)?;
    move_all(present, &new, |name| name != METADATA && name != SLABS)?;
    fs::rename(present.join(SLABS), new.join(SLABS))?;
    let _ = fs::remove_dir_all(present); // what the lost database makes there meanwhile is of no use
    Ok(new)
}

fn move_all(from: &Path, to: &Path, is_wanted: impl Fn(&str) -> bool) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let name = entry?.file_name();
        if name.to_str().is_some_and(&is_wanted) {
            fs::rename(from.join(&name), to.join(&name))?;
        }
    }
    Ok(())
}

fn path(dir: &Path, number: u32) -> PathBuf {
    match number {
        0 => dir.join(NAME),
        number => dir.join(format!("{NAME}-{number}")),
    }
}

fn numbers(dir: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let number = |entry: fs::DirEntry| {
        let name = entry.file_name();
        match name.to_str()?.strip_prefix(NAME)? {
            "" => Some(0),
            rest => rest.strip_prefix('-')?.parse().ok(),
        }
    };
    entries.flatten().filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// A move takes every file along; half a move leaves the old folder as the one to open; leftovers go.
    #[test]
    fn a_database_moves_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert_eq!(find(dir), dir.join("sled"));
        let files = ["metadata/log_1", "metadata/snapshot_0", "slabs/64", "cookie"];
        for file in files {
            let file = dir.join("sled").join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, file.file_name().unwrap().to_str().unwrap()).unwrap();
        }
        fs::create_dir_all(dir.join("sled-1/metadata")).unwrap();
        assert_eq!(find(dir), dir.join("sled"), "the new one has no slabs yet");
        assert!(!dir.join("sled-1").exists());

        let moved = move_on(dir, &dir.join("sled")).unwrap();
        assert_eq!((find(dir), moved.clone()), (dir.join("sled-1"), dir.join("sled-1")));
        assert!(files.iter().all(|file| moved.join(file).is_file()) && !dir.join("sled").exists());
        let moved = move_on(dir, &moved).unwrap();
        fs::create_dir_all(dir.join("sled-1/metadata")).unwrap();
        assert_eq!((find(dir), moved), (dir.join("sled-2"), dir.join("sled-2")));
        assert!(!dir.join("sled-1").exists(), "what the lost database made");
    }
}
