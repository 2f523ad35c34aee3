//! A device was offline for thirty days, its clock wrong by a year, and comes back, with real processes: the relay, the
//! device, which is killed again and again while it syncs, and another device of the same person.
//!
//! `SLEDGE_DEVICE_WRITES=10000 cargo test --release --test it thirty_days -- --nocapture` takes as many writes, ten times
//! as many events that both sides have, and kills twenty times. How long it took and what went over the wire is printed.

mod facts;
mod past;
pub mod process;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use serde::de::DeserializeOwned;
use sledge::protocol::{Event, Kind};
use tempfile::TempDir;

use self::facts::Fact;
use self::process::{Sight, Task, Told, What};
use crate::simulation::chance::Chance;
use crate::support::binary::lines;
use crate::support::device::today;
use crate::support::proxy::Proxy;
use crate::support::{Binary, Keys};

const WRITES_VARIABLE: &str = "SLEDGE_DEVICE_WRITES";
const FEW_WRITES: usize = 300;
const SECRET: [u8; 32] = [30; 32];
const MONTH_MS: u64 = 30 * 86_400_000;
const YEAR_MS: i64 = 365 * 86_400_000;
/// How long one process may take, when nothing is wrong.
const PATIENCE: Duration = Duration::from_secs(300);
/// What may go over the wire for one write, both ways: the event, its answer, and its echo to the own subscription.
/// 25 MB for ten thousand writes and three thousand events of others.
const BYTES_A_WRITE_MAX: u64 = 2_500;
/// What a visit costs however little there is to say: handshakes, relay information, sums of the sets.
const BYTES_A_VISIT_MAX: u64 = 40_000;

/// How much of everything.
#[derive(Clone, Copy, Debug)]
struct Size {
    writes: usize,
    shared: usize,
    elsewhere: usize,
    kills: usize,
}

fn size() -> Size {
    let asked = std::env::var(WRITES_VARIABLE).ok().map(|count| count.parse().expect("a number of writes"));
    let writes = asked.unwrap_or(FEW_WRITES);
    Size { writes, shared: writes * 10, elsewhere: writes * 3 / 10, kills: if asked.is_some() { 20 } else { 5 } }
}

/// Some words, the first of them unlike all others.
fn text(chance: &mut Chance, name: &str) -> String {
    let words = ["the", "river", "of", "a", "relay", "keeps", "what", "nobody", "else", "wrote", "down", "today"];
    let count = 5 + chance.below(40);
    let said: Vec<&str> = (0..count).filter_map(|_| chance.pick(&words).copied()).collect();
    format!("{name}: {}", said.join(" "))
}

/// Everything as it is when the device comes back; a directory for the relay, and one for each device.
struct Home {
    dir: TempDir,
    /// Leads to the relay, wherever it listens: what is owed is owed to this address.
    proxy: Arc<Proxy>,
    size: Size,
    facts: Vec<Fact>,
}

impl Home {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// All is shared, then each device writes for itself, and the other one has brought its writes to the relay.
    fn prepare() -> Home {
        let (dir, size, now_ms) = (TempDir::new().expect("a temporary directory"), size(), today() * 1000);
        let proxy = Arc::new(Proxy::new());
        let mut home = Home { dir, proxy, size, facts: Vec::new() };
        let mut chance = Chance::new(30);
        let (events, facts) = past::past(SECRET, size.shared, now_ms - MONTH_MS - 86_400_000, &mut chance);
        let [shared, known] = ["shared.jsonl", "known"].map(|name| home.path(name));
        fs::write(&shared, lines(&events)).expect("a writable directory");
        fs::write(&known, facts::lines(&facts)).expect("a writable directory");
        home.facts = facts;
        let relay = own_relay(&home.path("relay"));
        relay.run(&["import", shared.to_str().expect("a plain path")]).ok();
        let serving = relay.serve();
        home.proxy.lead_to(serving.addr());
        for (name, ahead_ms, count) in [("device", YEAR_MS, size.writes), ("other", 0, size.elsewhere)] {
            home.task(name, ahead_ms, What::Remember { events: shared.clone() }).run();
            let acks = home.path(&format!("{name}.acks"));
            let pace_ms = MONTH_MS / (count as u64 + 2);
            let (known, from_ms, seed) = (known.clone(), now_ms - MONTH_MS, count as u64);
            let what = What::Write { acks: acks.clone(), known, count, from_ms, pace_ms, seed, name: name.to_owned() };
            home.task(name, ahead_ms, what).run();
            home.facts.extend(facts::read(&acks));
        }
        home.task("other", 0, What::Sync { told: home.path("other.told") }).run();
        home
    }

    fn task(&self, name: &str, ahead_ms: i64, what: What) -> Task {
        Task { profile: self.path(name), relay: self.proxy.url(), ahead_ms, what }
    }

    /// The same once more, in directories of its own.
    fn copy(&self) -> Home {
        let dir = TempDir::new().expect("a temporary directory");
        for name in ["relay", "device", "other"] {
            copy_all(&self.path(name), &dir.path().join(name));
        }
        Home { dir, proxy: Arc::clone(&self.proxy), size: self.size, facts: self.facts.clone() }
    }
}

/// The relay of somebody who has told it the own key, so that it does not slow down the own devices.
fn own_relay(data: &Path) -> Binary {
    let relay = Binary::on(data);
    relay.configure(&format!("[rate]\nexempt_keys = [\"{}\"]\n", Keys::of_secret(SECRET).hex()));
    relay
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a writable directory");
    for entry in fs::read_dir(from).expect("a readable directory") {
        let path = entry.expect("a readable directory").path();
        let target = to.join(path.file_name().expect("it has a name"));
        // Neither: the socket of a relay that has ended.
        if path.is_dir() {
            copy_all(&path, &target);
        } else if path.is_file() {
            fs::copy(&path, &target).expect("room");
        }
    }
}

fn read<T: DeserializeOwned>(file: &Path) -> T {
    serde_json::from_str(&fs::read_to_string(file).expect("it was written")).expect("as it was written")
}

/// The relay, the wire before it, and the devices.
struct Scene {
    home: Home,
    relay: Binary,
    serving: crate::support::Serving,
}

impl Scene {
    fn of(home: Home) -> Scene {
        let relay = own_relay(&home.path("relay"));
        let serving = relay.serve();
        home.proxy.lead_to(serving.addr());
        home.proxy.take_passed();
        Scene { home, relay, serving }
    }

    fn task(&self, name: &str, what: What) -> Task {
        let ahead_ms = if name == "device" { YEAR_MS } else { 0 };
        self.home.task(name, ahead_ms, what)
    }

    fn sync(&self, name: &str) -> Told {
        let told = self.home.path("told");
        self.task(name, What::Sync { told: told.clone() }).run();
        read(&told)
    }

    /// Starts a sync and kills it when so many bytes have passed. Whether it was still at work then.
    fn sync_and_kill(&self, bytes: u64) -> bool {
        let (tell, told) = channel();
        let mut child = self.task("device", What::Sync { told: self.home.path("told") }).start();
        tell_end(&mut child, tell.clone());
        self.home.proxy.after(bytes, move || {
            let _ = tell.send(Heard::Alarm);
        });
        let heard = told.recv_timeout(PATIENCE).expect("it goes on or ends");
        // kill -9; a process that has ended is not hurt by it.
        child.kill().expect("the process is ours");
        let status = child.wait().expect("the process is ours");
        assert!(heard == Heard::Alarm || status.success(), "it failed by itself");
        !status.success()
    }

    /// Nothing is lost, and everybody has the same; `told` is from the last visit of the device.
    fn check(self, told: &Told) {
        assert_eq!((told.waiting, told.dead, told.conflicts), (0, 0, 0), "{told:?}");
        let sights = ["device", "other"].map(|name| {
            let file = self.home.path(&format!("{name}.sight"));
            self.task(name, What::Show { shown: file.clone() }).run();
            read::<Sight>(&file)
        });
        let expected = facts::shown(self.home.facts.iter().cloned());
        for (name, sight) in ["the device", "the other device"].iter().zip(&sights) {
            compare(name, &sight.shown, &expected);
            assert_eq!((sight.heads, sight.pending), (1, 0), "{name}");
        }
        same_ids("the devices", &sights[0].ids, &sights[1].ids);
        let Scene { relay, mut serving, .. } = self;
        serving.kill();
        let author = Keys::of_secret(SECRET).hex();
        let filters = [format!("{{\"authors\":[\"{author}\"]}}"), "{\"#L\":[\"com.openagents.sync\"]}".to_owned()];
        let found = relay.run(&["query", &filters[0], &filters[1]]).ok();
        let found: Vec<Event> = found.lines().map(|line| Event::from_json(line).expect("an event a line")).collect();
        let mut ids: Vec<String> = found.iter().map(named).collect();
        ids.sort();
        same_ids("relay and device", &ids, &sights[0].ids);
        // All that a device has set is one event, and one of the two names the other. The one of the past is older than
        // former versions are kept.
        let settings = found.iter().filter(|event| event.kind == Kind(10_001));
        assert_eq!(settings.count(), 2, "each device says its settings in one event");
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Alarm,
    End,
}

/// Says when the process has ended: its output does then.
fn tell_end(child: &mut Child, tell: Sender<Heard>) {
    let mut output = child.stdout.take().expect("it is piped");
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut output, &mut std::io::sink());
        let _ = tell.send(Heard::End);
    });
}

/// An event as a failure tells it.
fn named(event: &Event) -> String {
    format!("{} of kind {} from {}", event.id, event.kind, event.created_at)
}

/// Both lists are sorted.
#[track_caller]
fn same_ids(who: &str, one: &[String], other: &[String]) {
    let without = |all: &[String], of: &[String]| -> Vec<String> {
        all.iter().filter(|id| of.binary_search(id).is_err()).take(5).cloned().collect()
    };
    let only = (without(one, other), without(other, one));
    assert!(only.0.is_empty() && only.1.is_empty(), "{who} do not hold the same events; only one has {only:?}");
}

#[track_caller]
fn compare(name: &str, shown: &facts::Shown, expected: &facts::Shown) {
    let lost: Vec<_> = expected.iter().filter(|(what, value)| shown.get(*what) != Some(value)).take(5).collect();
    let found: Vec<_> = lost.iter().map(|(what, _)| shown.get(*what)).collect();
    assert!(lost.is_empty(), "{name} lacks {lost:?}; it has {found:?}");
    let strange: Vec<_> = shown.iter().filter(|(what, _)| !expected.contains_key(*what)).take(5).collect();
    assert!(strange.is_empty(), "{name} shows what nobody wrote, or what was deleted: {strange:?}");
}

/// The device comes back and syncs, once undisturbed, and once killed again and again: both ways everybody ends with the
/// same events, which say what was acknowledged and nothing else, and the wire carries little more than what is new.
#[test]
fn a_device_that_was_offline_for_thirty_days_loses_nothing() {
    let home = Home::prepare();
    undisturbed(home.copy());
    killed(home);
}

fn undisturbed(home: Home) {
    let (writes, scene) = (home.size.writes as u64, Scene::of(home));
    let told = scene.sync("device");
    let passed = scene.home.proxy.take_passed();
    eprintln!("undisturbed, of {:?}: {told:?}, {passed:?}", scene.home.size);
    assert!((-YEAR_MS - told.offset_ms.expect("the relay tells the time")).abs() < 5_000, "{told:?}");
    let room = writes * BYTES_A_WRITE_MAX + BYTES_A_VISIT_MAX;
    assert!(passed.up + passed.down <= room, "{passed:?} of {room}");
    let other = scene.sync("other");
    eprintln!("the other device after it: {other:?}, {:?}", scene.home.proxy.take_passed());
    scene.check(&told);
}

fn killed(home: Home) {
    let scene = Scene::of(home);
    let Size { writes, kills, .. } = scene.home.size;
    let mut chance = Chance::new(9);
    // On the whole about half of what there is to be moved, so that all of them hit a device at work.
    let farthest = BYTES_A_VISIT_MAX as usize + writes * 2_500 / kills;
    for kill in 0..kills {
        let bytes = chance.below(farthest) as u64;
        assert!(scene.sync_and_kill(bytes), "kill {kill} came too late");
    }
    scene.home.proxy.take_passed();
    let told = scene.sync("device");
    eprintln!("after {kills} kills: {told:?}, {:?}", scene.home.proxy.take_passed());
    scene.sync("other");
    scene.check(&told);
}
