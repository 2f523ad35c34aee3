//! A machine with little memory: the process runs in a control group with a limit, as on a small Raspberry Pi. Making one
//! takes root; without it this test says that it is skipped.
//!
//! `SLEDGE_MEMORY_EVENTS=1000000 cargo test --release --test it small_machine` takes as many events and 256 MB.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::binary::{Binary, Serving};
use crate::support::{Client, Keys, NOW, json_of};

const EVENTS_VARIABLE: &str = "SLEDGE_MEMORY_EVENTS";
const AUTHORS: u64 = 50;
/// What a test run takes, and the limit for it.
const FEW: (u64, u64) = (6_000, 64 << 20);
/// The limit for whatever the variable says.
const LIMIT_BYTES: u64 = 256 << 20;

/// A control group with a memory limit; removed when dropped.
struct Group {
    path: PathBuf,
}

impl Group {
    /// `None` where it cannot be had; says why.
    fn with_limit(bytes: u64) -> Option<Group> {
        let name = format!("sledge-test-{}", std::process::id());
        // Version 1 of control groups, then version 2.
        for (root, file) in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")] {
            let path = Path::new(root).join(&name);
            if !Path::new(root).join("cgroup.procs").exists() || fs::create_dir(&path).is_err() {
                continue;
            }
            let group = Group { path };
            if fs::write(group.path.join(file), bytes.to_string()).is_ok() {
                return Some(group);
            }
        }
        eprintln!("skipped: no control group with a memory limit can be made, which takes root");
        None
    }

    /// The command, run within the group. The shell becomes the command, so it is one process.
    fn run_within(&self, command: &Command) -> Command {
        let mut within = Command::new("sh");
        within.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.path.join("cgroup.procs"));
        within.arg(command.get_program()).args(command.get_args());
        if let Some(dir) = command.get_current_dir() {
            within.current_dir(dir);
        }
        within.env_remove("SLEDGE_CONFIG").env_remove("SLEDGE_LOG").env_remove("MALLOC_ARENA_MAX");
        within.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        within
    }

    /// The most that the group has taken, as far as the system tells.
    fn peak_bytes(&self) -> Option<u64> {
        let files = ["memory.max_usage_in_bytes", "memory.peak"];
        files.iter().find_map(|file| fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

/// So many events are imported, served to readers, written to, killed and served again within the limit, with the
/// settings as they come: the memory budget follows the limit by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_store_is_imported_and_served_in_little_memory() {
    let asked: Option<u64> = std::env::var(EVENTS_VARIABLE).ok().map(|text| text.parse().expect("a number"));
    let (events, limit) = asked.map_or(FEW, |events| (events, LIMIT_BYTES));
    let Some(group) = Group::with_limit(limit) else { return };
    let binary = Binary::new();
    let file = events_file(&binary, events);

    let import = group.run_within(&binary.command(&["import", &file])).stdin(Stdio::piped()).spawn().unwrap();
    let ran = tokio::task::spawn_blocking(move || finish_whenever(import)).await.unwrap();
    assert!(ran.0, "the import was not finished, or killed for want of memory: {}", ran.1);
    assert!(ran.1.contains("imported"), "{}", ran.1);
    for round in 0..2 {
        let command = binary.command(&["serve", "--listen", "127.0.0.1:0"]);
        let mut serving = Serving::start(group.run_within(&command));
        let mut client = Client::connect(serving.addr()).await;
        for n in 0..20 {
            let author = Keys::new(n % AUTHORS).hex();
            let stored = client.query(json!({"authors": [author], "limit": 100})).await.events;
            assert!(stored.len() >= 100.min((events / AUTHORS) as usize), "{}", stored.len());
        }
        let new: Vec<_> = (0..200).map(|n| Keys::new(5_000).note(NOW + round * 1_000 + n, "")).collect();
        client.store_all(&new).await;
        assert_eq!(client.count(&[json!({"authors": [Keys::new(5_000).hex()]})]).await, 200 * (round + 1));
        serving.kill();
    }
    eprintln!("{events} events within {} MB; at most {:?} bytes with the file cache", limit >> 20, group.peak_bytes());
}

/// A file of signed events, written as it is made: it is larger than memory should be.
fn events_file(binary: &Binary, events: u64) -> String {
    let path = binary.file("events.jsonl", "");
    let mut out = std::io::BufWriter::new(fs::File::create(&path).unwrap());
    let authors: Vec<Keys> = (0..AUTHORS).map(Keys::new).collect();
    for n in 0..events {
        let author = &authors[(n % AUTHORS) as usize];
        let to = authors[(n * 7 % AUTHORS) as usize].hex();
        let event = author.draft(1, NOW - events + n).tag(["p", &to]).tag(["t", &format!("topic{}", n % 200)]);
        let event = event.tag(["e", &format!("{:064x}", n * 7_919)]).content("some words of a note ".repeat(15)).sign();
        writeln!(out, "{}", json_of(&event)).unwrap();
    }
    out.flush().unwrap();
    path
}

/// Waits as long as it takes, which a million events may; whether it ended well, and what it said.
fn finish_whenever(child: std::process::Child) -> (bool, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}
