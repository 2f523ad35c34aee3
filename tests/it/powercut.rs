//! Power cuts on a real file system: ext4 on a loop device, shut down without a journal flush, so that what was not
//! synced is lost. Needs root, loop devices, e2fsprogs and python3; where one is missing the test says so and passes.
//!
//! `SLEDGE_POWERCUT_ROUNDS=200 cargo test --test it powercut` is the long form.

use std::path::{Path, PathBuf};
use std::process::Command;

use sledge::store::fault::POINTS;
use tempfile::TempDir;

use crate::fault::{acknowledged, assert_left_in_order, spawn_child_with_store};

/// Each fault point once, unless more rounds are asked for.
const ROUNDS: usize = 6;

/// EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH.
const CUT: &str = "import fcntl, os, struct, sys\n\
    fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack('I', 2))";

/// A mounted file system of our own.
struct Disk {
    dir: TempDir,
}

impl Disk {
    fn new() -> Result<Disk, String> {
        let disk = Disk { dir: tempfile::tempdir().map_err(|error| error.to_string())? };
        std::fs::create_dir(disk.mount_point()).map_err(|error| error.to_string())?;
        run("truncate", &["-s", "192M", disk.image().as_str()])?;
        run("mkfs.ext4", &["-q", "-F", disk.image().as_str()])?;
        disk.mount()?;
        Ok(disk)
    }

    fn image(&self) -> String {
        self.dir.path().join("image").display().to_string()
    }

    fn mount_point(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn mount(&self) -> Result<(), String> {
        // No journal commit of its own accord while a round runs.
        run("mount", &["-o", "loop,commit=3600", &self.image(), &self.mount_point().display().to_string()])
    }

    /// Cuts the power, lets it come back, and replays the journal.
    fn cut(&self) -> Result<(), String> {
        run("python3", &["-c", CUT, &self.mount_point().display().to_string()])?;
        run("umount", &[&self.mount_point().display().to_string()])?;
        self.mount()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = run("umount", &[&self.mount_point().display().to_string()]);
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

fn rounds() -> usize {
    std::env::var("SLEDGE_POWERCUT_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().expect("a number of rounds"))
}

/// At a fault point the process ends and the power goes. What was acknowledged is there afterwards.
#[test]
fn a_power_cut_loses_nothing_acknowledged() {
    let disk = match Disk::new() {
        Ok(disk) => disk,
        Err(why) => return eprintln!("skipped: no file system to cut the power of ({why})"),
    };
    if !loses_what_was_not_synced(&disk) {
        return eprintln!("skipped: something syncs all file systems all the time");
    }
    for round in 0..rounds() {
        // Spread over the points also when there are few rounds; later rounds die later.
        let point = POINTS[round * 7 % POINTS.len()];
        let fault = format!("{point}:{}", 1 + round / POINTS.len());
        cut_once(&disk, &fault, round);
    }
}

/// The control: a power cut that loses nothing would prove nothing. Another process may sync all file systems at any
/// moment (opening sled does), so it is given several chances.
fn loses_what_was_not_synced(disk: &Disk) -> bool {
    let file = disk.mount_point().join("unsynced");
    (0..50).any(|_| {
        std::fs::write(&file, [7; 100_000]).unwrap();
        disk.cut().unwrap();
        let is_lost = !file.exists();
        let _ = std::fs::remove_file(&file);
        is_lost
    })
}

fn cut_once(disk: &Disk, fault: &str, round: usize) {
    let notes = tempfile::tempdir().unwrap();
    let store = disk.mount_point().join(format!("store-{round}"));
    spawn_child_with_store(notes.path(), &store, Some(fault));
    disk.cut().unwrap();
    if store.exists() {
        assert_left_in_order(&store, acknowledged(notes.path()), fault);
        std::fs::remove_dir_all(&store).unwrap();
    } else {
        assert_eq!(acknowledged(notes.path()), 0, "{fault}: the store is gone");
    }
    assert_clean(&disk.mount_point());
}

/// Nothing is left over for the next round to stumble on.
fn assert_clean(mount_point: &Path) {
    let left: Vec<_> = std::fs::read_dir(mount_point).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["lost+found"]);
}
