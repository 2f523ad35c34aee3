//! A device as a process of its own: this test binary, started again with a task. Its clock is as wrong as the task says.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sledge::client::Client;
use sledge::client::clock::World;
use sledge::client::keys::Keys;
use sledge::client::link::LinkOptions;
use sledge::client::links::Visit;
use sledge::client::profile::ProfileOptions;
use sledge::protocol::{Event, Filter, label};
use sledge::sync::chat::ChatKey;
use sledge::sync::training::{Consent, Quality, Terms};

use super::facts::{self, Fact};
use super::{PATIENCE, SECRET, named, past, text};
use crate::simulation::chance::Chance;
use crate::support::device::today;

/// The task of the child, as JSON; without it the child is just an empty test.
const TASK: &str = "SLEDGE_DEVICE_TASK";
/// Events that are put into the profile at a time.
const SEEDED_AT_ONCE: usize = 1_000;
/// Of a thousand writes: what they are, by upper bounds.
const SENDS: usize = 760;
const EDITS: usize = 880;
const DELETES: usize = 930;
const SETTINGS: usize = 970;
const TITLES: usize = 980;
const TRAINING: usize = 990;

/// Which device, and what it does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    pub profile: PathBuf,
    pub relay: String,
    /// What its clock shows beyond the true time.
    pub ahead_ms: i64,
    pub what: What,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum What {
    /// Takes the events in a file, as it did when they were new.
    Remember { events: PathBuf },
    /// Writes offline, from `from_ms` on, and notes in `acks` what was acknowledged.
    Write { acks: PathBuf, known: PathBuf, count: usize, from_ms: u64, pace_ms: u64, seed: u64, name: String },
    /// Visits the relay once.
    Sync { told: PathBuf },
    /// Writes down what an app sees.
    Show { shown: PathBuf },
}

/// What a visit took.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    pub open_secs: f64,
    pub sync_secs: f64,
    pub close_secs: f64,
    /// Of all threads, opening and closing included.
    pub cpu_secs: f64,
    pub fetched: usize,
    pub waiting: usize,
    pub dead: usize,
    pub conflicts: usize,
    pub offset_ms: Option<i64>,
}

/// What an app sees, and the ids of all events beneath.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sight {
    pub shown: facts::Shown,
    pub ids: Vec<String>,
    pub heads: usize,
    pub pending: usize,
}

impl Task {
    /// Starts the process.
    pub fn start(&self) -> Child {
        let mut command = Command::new(std::env::current_exe().expect("this is a program"));
        command.args(["--exact", "thirty_days::process::device", "--test-threads", "1", "--nocapture"]);
        command.env(TASK, serde_json::to_string(self).expect("paths are text"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("this program starts")
    }

    /// Runs the process to its end, which must be a good one.
    #[track_caller]
    pub fn run(&self) {
        let output = self.start().wait_with_output().expect("it ends");
        assert!(output.status.success(), "{self:?}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

/// Not a test of its own: the process.
#[test]
fn device() {
    let Some(task) = std::env::var_os(TASK) else { return };
    let task: Task = serde_json::from_str(&task.into_string().unwrap()).unwrap();
    match &task.what {
        What::Remember { events } => remember(&open(&task, World::system()), events),
        What::Write { .. } => write(&task),
        What::Sync { told } => {
            let ahead_ms = task.ahead_ms;
            let system = World::system();
            let wrong = World::with_clock(move || system.now_ms().saturating_add_signed(ahead_ms));
            sync(&task, wrong, told);
        }
        What::Show { shown } => show(&open(&task, World::system()), shown),
    }
}

fn open(task: &Task, world: World) -> Client {
    let options = ProfileOptions {
        dir: task.profile.clone(),
        relays: vec![task.relay.clone()],
        training_relays: vec![task.relay.clone()],
        outbox_bytes_max: 256 << 20,
        memory_bytes: 16 << 20,
    };
    let keys = Keys::from_secret_bytes(SECRET).unwrap();
    Client::open(&options, keys, LinkOptions::default(), world).unwrap()
}

fn remember(client: &Client, events: &Path) {
    let text = std::fs::read_to_string(events).unwrap();
    let events: Vec<Event> = text.lines().map(|line| Event::from_json(line).unwrap()).collect();
    for part in past::verified(events).chunks(SEEDED_AT_ONCE) {
        client.profile().cache().put(part, today()).unwrap();
    }
    client.profile().close(Instant::now() + PATIENCE).unwrap();
}

fn sync(task: &Task, world: World, told: &Path) {
    let begun = Instant::now();
    let client = open(task, world);
    let opened = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let visits = runtime.block_on(client.visit_relays(PATIENCE));
    let synced = Instant::now();
    assert!(visits.values().all(|visit| *visit == Visit::Settled), "{visits:?}");
    let status = client.status().borrow().clone();
    runtime.block_on(client.close(PATIENCE)).unwrap();
    let at_relay = status.relays.values().next().unwrap();
    let what = Told {
        open_secs: (opened - begun).as_secs_f64(),
        sync_secs: (synced - opened).as_secs_f64(),
        close_secs: synced.elapsed().as_secs_f64(),
        cpu_secs: cpu_secs(),
        fetched: at_relay.fetched,
        waiting: status.waiting,
        dead: status.dead,
        conflicts: status.conflicts,
        offset_ms: at_relay.clock_offset_ms,
    };
    std::fs::write(told, serde_json::to_string(&what).unwrap()).unwrap();
}

/// Processor time of this process, where the system tells it.
fn cpu_secs() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| after_name.get(at).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or(0.0);
    // User and system time; a tick is a hundredth of a second on every Linux.
    (ticks(11) + ticks(12)) / 100.0
}

fn show(client: &Client, shown: &Path) {
    let mut sight = Sight::default();
    let mut see = |what: String, value: &str| drop(sight.shown.insert(what, value.to_owned()));
    for head in client.chats().list().unwrap() {
        let chat = &head.chat;
        if let Some(title) = head.title() {
            see(format!("title {}", chat.id), title);
        }
        for message in client.chats().messages(chat).unwrap() {
            sight.pending += usize::from(message.pending);
            see(format!("message {}/{}", chat.id, message.message.id), &message.message.content);
        }
    }
    for (name, value) in client.settings().all().unwrap() {
        see(format!("setting {name}"), value.as_str().unwrap());
    }
    for given in client.training().status(&[]).unwrap() {
        see(format!("training {}", given.contribution.content), "");
    }
    let notes = Filter::from_json(r#"{"kinds":[1]}"#).unwrap();
    for note in client.query(&[notes]).unwrap() {
        if !label::is_labelled(&note) {
            see(format!("note {}", note.content), "");
        }
    }
    let all = Filter::from_json(r##"{"#L":["com.openagents.sync"]}"##).unwrap();
    sight.ids = client.query(&[all, Filter::default()]).unwrap().iter().map(named).collect();
    sight.ids.sort();
    sight.ids.dedup();
    sight.heads = client.profile().see(|all, _| all.settings.heads().count()).unwrap();
    std::fs::write(shown, serde_json::to_string(&sight).unwrap()).unwrap();
}

/// Somebody who writes, offline.
struct Writer<'c> {
    client: &'c Client,
    /// What the device's clock shows.
    clock: Arc<AtomicU64>,
    ahead_ms: i64,
    /// The true time.
    now_ms: u64,
    chance: Chance,
    name: String,
    acks: File,
    chats: Vec<ChatKey>,
    /// Chat and message, as far as this device knows and did not delete them.
    messages: Vec<(String, String)>,
}

fn write(task: &Task) {
    let What::Write { acks, known, count, from_ms, pace_ms, seed, name } = &task.what else { unreachable!() };
    let clock = Arc::new(AtomicU64::new(from_ms.saturating_add_signed(task.ahead_ms)));
    let client = open(task, World::manual(Arc::clone(&clock)));
    let known = facts::read(known);
    let of = |kind: &str| {
        let kind = format!("{kind} ");
        known.iter().filter_map(move |fact| fact.0.strip_prefix(&kind).map(str::to_owned)).collect::<Vec<_>>()
    };
    let split = |both: String| both.split_once('/').map(|(chat, id)| (chat.to_owned(), id.to_owned())).unwrap();
    let mut writer = Writer {
        client: &client,
        clock,
        ahead_ms: task.ahead_ms,
        now_ms: *from_ms,
        chance: Chance::new(*seed),
        name: name.clone(),
        acks: OpenOptions::new().create(true).append(true).open(acks).unwrap(),
        chats: of("title").iter().map(|id| client.chats().own(id)).collect(),
        messages: of("message").into_iter().map(split).collect(),
    };
    for number in 0..*count {
        writer.now_ms += pace_ms;
        writer.clock.store(writer.now_ms.saturating_add_signed(writer.ahead_ms), Ordering::Relaxed);
        let facts = if number == count / 2 { writer.delete_chat() } else { writer.write(number) };
        // Acknowledged: from here on it must not be lost.
        writer.acks.write_all(facts::lines(&facts).as_bytes()).unwrap();
    }
    client.profile().close(Instant::now() + PATIENCE).unwrap();
}

impl Writer<'_> {
    fn write(&mut self, number: usize) -> Vec<Fact> {
        let at_ms = self.now_ms;
        let text = text(&mut self.chance, &format!("{} {number}", self.name));
        match self.chance.below(1_000) {
            roll if roll < SENDS => vec![self.send(&text)],
            roll if roll < EDITS => {
                let (chat, id) = self.chance.pick(&self.messages).unwrap().clone();
                self.client.chats().edit(&self.client.chats().own(&chat), &id, &text).unwrap();
                vec![Fact::message(&chat, &id, at_ms, Some(&text))]
            }
            roll if roll < DELETES => {
                let at = self.chance.below(self.messages.len());
                let (chat, id) = self.messages.swap_remove(at);
                self.client.chats().delete(&self.client.chats().own(&chat), &id).unwrap();
                vec![Fact::message(&chat, &id, at_ms, None)]
            }
            roll if roll < SETTINGS => {
                let name = format!("s{}", self.chance.below(30));
                self.client.settings().set(&name, Value::from(text.as_str()), false).unwrap();
                vec![Fact::setting(&name, at_ms, &text)]
            }
            roll if roll < TITLES => {
                let chat = self.chance.pick(&self.chats).unwrap().clone();
                self.client.chats().set(&chat, "title", Value::from(text.as_str())).unwrap();
                vec![Fact::title(&chat.id, at_ms, Some(&text))]
            }
            roll if roll < TRAINING => {
                let terms = Terms { quality: Quality::new(80), license: "CC0-1.0".to_owned(), curators: Vec::new() };
                self.client.training().contribute(&text, terms, Consent::to(&text)).unwrap();
                vec![Fact::training(&text, at_ms)]
            }
            _ => {
                self.client.publish(1, Vec::new(), &text).unwrap();
                vec![Fact::note(&text, at_ms)]
            }
        }
    }

    /// In an old chat, or in one of those that were begun meanwhile.
    fn send(&mut self, text: &str) -> Fact {
        if self.chance.percent(2) {
            let chat = self.client.chats().create(text).unwrap();
            self.chats.push(chat.clone());
            return Fact::title(&chat.id, self.now_ms, Some(text));
        }
        let chat = self.chance.pick(&self.chats).unwrap().clone();
        let id = self.client.chats().send(&chat, "user", text, Value::Null).unwrap();
        self.messages.push((chat.id.clone(), id.clone()));
        Fact::message(&chat.id, &id, self.now_ms, Some(text))
    }

    /// A chat goes with all that this device knows of it.
    fn delete_chat(&mut self) -> Vec<Fact> {
        let at = self.chance.below(self.chats.len());
        let chat = self.chats.swap_remove(at);
        self.client.chats().delete_chat(&chat).unwrap();
        let (gone, left) = std::mem::take(&mut self.messages).into_iter().partition(|(of, _)| *of == chat.id);
        self.messages = left;
        let at_ms = self.now_ms;
        let mut facts = vec![Fact::title(&chat.id, at_ms, None)];
        facts.extend(gone.into_iter().map(|(chat, id)| Fact::message(&chat, &id, at_ms, None)));
        facts
    }
}
