//! The index engines side by side, each behind the write buffer: importing, importing under reads, opening, reading.
//!
//! `cargo bench --bench index` takes 100,000 events, `cargo bench --bench index -- 1000000` as many as it says. Each
//! measurement is a process of its own, so that its memory is its own. An event is 9.5 entries; every twentieth removes
//! an older one. No record is read: what the event log costs comes on top.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use sledge::store::index::buffer::BufferedIndex;
use sledge::store::index::{Change, Engine, Key, Value};

const ENGINES: [Engine; 2] = [Engine::Sled, Engine::Fjall];
const CACHE_BYTES: u64 = 64 << 20;
const RUN_ENTRIES: usize = 600_000;
const BATCH_EVENTS: u64 = 1_000;
const AUTHORS: u64 = 5_000;
const PATIENCE: Duration = Duration::from_secs(3_600);

/// What is measured, in the order of the table, with its unit.
const ROWS: [(&str, &str); 15] = [
    ("import, all merges done", "k events/s"),
    ("processor time an event", "µs"),
    ("peak memory", "MB"),
    ("worst wait of a batch", "ms"),
    ("bytes written an event", ""),
    ("bytes on disk an event", ""),
    ("import beside a reader", "k events/s"),
    ("reads beside the import", "k/s"),
    ("slowest of 1,000 reads beside the import", "µs"),
    ("slowest read beside the import", "ms"),
    ("open", "ms"),
    ("one id", "µs"),
    ("newest 100 of an author", "µs"),
    ("one match of a tag", "µs"),
    ("newest 16 of each of 500 authors", "ms"),
];

type Figures = BTreeMap<String, f64>;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    match &arguments[..] {
        [part, engine, events] => measure(part, engine, events.parse().unwrap()),
        [events] => compare(events.parse().unwrap()),
        _ => compare(100_000),
    }
}

fn compare(events: u64) {
    let figures = ENGINES.map(|engine| {
        let mut all = Figures::new();
        for part in ["alone", "read"] {
            let mut child = Command::new(std::env::current_exe().unwrap());
            let output = child.args([part, &engine.to_string(), &events.to_string()]).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let text = String::from_utf8(output.stdout).unwrap();
            all.extend(
                text.lines().map(|line| line.split_once('\t').unwrap()).map(|(k, v)| (k.into(), v.parse().unwrap())),
            );
        }
        all
    });
    println!("| {events} events | unit | {} | {} |\n|---|---|---|---|", ENGINES[0], ENGINES[1]);
    for (row, unit) in ROWS {
        println!("| {row} | {unit} | {} | {} |", show(figures[0][row]), show(figures[1][row]));
    }
}

fn show(figure: f64) -> String {
    if figure < 10.0 { format!("{figure:.1}") } else { format!("{figure:.0}") }
}

fn tell(row: &str, figure: f64) {
    assert!(ROWS.iter().any(|(name, _)| *name == row), "{row}");
    println!("{row}\t{figure}");
}

fn measure(part: &str, engine: &str, events: u64) {
    let engine = *ENGINES.iter().find(|known| known.to_string() == engine).unwrap();
    let dir = tempfile::tempdir().unwrap();
    match part {
        "alone" => {
            import_alone(engine, dir.path(), events);
            read(engine, dir.path(), events);
        }
        _ => import_beside_a_reader(engine, dir.path(), events),
    }
}

fn open(engine: Engine, dir: &Path) -> BufferedIndex {
    let engine = engine.open(dir, CACHE_BYTES, Duration::from_secs(60)).unwrap();
    BufferedIndex::new(engine, RUN_ENTRIES, Box::new(|_| Ok(()))).unwrap()
}

fn import_alone(engine: Engine, dir: &Path, events: u64) {
    let began = processor_time();
    (0..events).step_by(BATCH_EVENTS as usize).for_each(|first| drop(black_box(batch(first))));
    let making = processor_time() - began;

    let index = open(engine, dir);
    let (began, began_processor) = (Instant::now(), processor_time());
    let worst = import(&index, events);
    index.merge_now(&|| false).unwrap();
    tell("import, all merges done", events as f64 / (began.elapsed() - making).as_secs_f64() / 1e3);
    tell("processor time an event", (processor_time() - began_processor - making).as_secs_f64() * 1e6 / events as f64);
    tell("peak memory", number_in("/proc/self/status", "VmHWM:") / 1024.0);
    tell("worst wait of a batch", worst.as_secs_f64() * 1e3);
    index.close(Instant::now() + PATIENCE).unwrap();
    tell("bytes on disk an event", index.bytes_on_disk() as f64 / events as f64);
    drop(index);
    tell("bytes written an event", number_in("/proc/self/io", "write_bytes:") / events as f64);
}

/// The longest that one batch took.
fn import(index: &BufferedIndex, events: u64) -> Duration {
    let apply = |first| {
        let changes = batch(first);
        let began = Instant::now();
        index.apply(&changes, first).unwrap();
        began.elapsed()
    };
    (0..events).step_by(BATCH_EVENTS as usize).map(apply).max().unwrap()
}

fn import_beside_a_reader(engine: Engine, dir: &Path, events: u64) {
    let index = open(engine, dir);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut times = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let began = Instant::now();
                read_once(&index, events, times.len() as u64);
                times.push(began.elapsed());
            }
            times
        });
        let began = Instant::now();
        import(&index, events);
        index.merge_now(&|| false).unwrap();
        let took = began.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        let mut times = reader.join().unwrap();
        times.sort();
        tell("import beside a reader", events as f64 / took / 1e3);
        tell("reads beside the import", times.len() as f64 / took / 1e3);
        tell("slowest of 1,000 reads beside the import", times[times.len() * 999 / 1000].as_secs_f64() * 1e6);
        tell("slowest read beside the import", times.last().unwrap().as_secs_f64() * 1e3);
    });
}

/// One look-up by id, then one page of an author, in turn.
fn read_once(index: &BufferedIndex, events: u64, number: u64) {
    let event = hash(number) % events;
    if number.is_multiple_of(2) {
        black_box(index.get(&by_id(event)).unwrap());
    } else {
        black_box(newest(index, &author_prefix(author_of(event)), 20));
    }
}

fn read(engine: Engine, dir: &Path, events: u64) {
    let began = Instant::now();
    let index = open(engine, dir);
    black_box(index.get(&by_id(1)).unwrap());
    tell("open", began.elapsed().as_secs_f64() * 1e3);

    let stored = |number: u64| (hash(number) % events) / 10 * 10 + 1; // those are never removed
    tell("one id", mean(20_000, |n| assert!(index.get(&by_id(stored(n))).unwrap().is_some())) * 1e6);
    let author = |n: u64| author_prefix(author_of(stored(n)));
    tell("newest 100 of an author", mean(5_000, |n| assert!(!newest(&index, &author(n), 100).is_empty())) * 1e6);
    let tag = |n: u64| tag_prefix(b'd', stored(n));
    tell("one match of a tag", mean(5_000, |n| assert_eq!(newest(&index, &tag(n), 16).len(), 1)) * 1e6);
    let all =
        |n: u64| (0..500).for_each(|author| drop(newest(&index, &author_prefix((n * 500 + author) % AUTHORS), 16)));
    tell("newest 16 of each of 500 authors", mean(20, all) * 1e3);
}

/// Seconds that `work` takes on average, after as much again to warm the caches.
fn mean(times: u64, work: impl Fn(u64)) -> f64 {
    (times..2 * times).for_each(&work);
    let began = Instant::now();
    (0..times).for_each(&work);
    began.elapsed().as_secs_f64() / times as f64
}

fn newest(index: &BufferedIndex, prefix: &[u8], limit: usize) -> Vec<(Key, Value)> {
    let mut end = prefix.to_vec();
    end.resize(31, 0xff);
    let mut found = Vec::new();
    index.scan(prefix, &end, limit, &mut found).unwrap();
    found
}

/// The changes of a thousand events.
fn batch(first: u64) -> Vec<Change> {
    let mut changes = Vec::with_capacity(BATCH_EVENTS as usize * 10);
    for event in first..first + BATCH_EVENTS {
        entries(event, |key, value| changes.push((key, Some(value))));
        if event.is_multiple_of(20) && event > 0 {
            entries(event / 2, |key, _| changes.push((key, None)));
        }
    }
    changes
}

/// The entries of an event, laid out as the schema's: see `store::schema`.
fn entries(event: u64, mut each: impl FnMut(Key, Value)) {
    let (id, at) = (hash(event), &(event * 100).to_be_bytes()[3..]);
    let suffix = [&(!(1_767_225_600 + event / 4)).to_be_bytes(), &id.to_be_bytes()[..4], at].concat();
    let author = author_prefix(author_of(event));
    let kind = [0, [1, 7, 6, 0][(id % 4) as usize]];
    let row = Value::new(&[1, kind[0], kind[1]]);
    each(by_id(event), Value::new(&[at, &[1]].concat()));
    let mut add = |prefix: &[u8]| each(Key::new(&[prefix, &suffix].concat()), row);
    add(&[2]);
    add(&author);
    add(&[&[4], &author[1..], &kind].concat());
    add(&[&[5], &kind[..]].concat());
    add(&tag_prefix(b'd', event)); // known to nobody else
    add(&tag_prefix(b'p', hash(event * 8 + 2) % AUTHORS));
    add(&tag_prefix(b'e', hash(event * 8 + 3) % (event + 1)));
    add(&tag_prefix(b't', hash(event * 8 + 4) % 200));
    if event.is_multiple_of(2) {
        add(&tag_prefix(b'p', hash(event * 8 + 5) % AUTHORS));
    }
}

fn by_id(event: u64) -> Key {
    Key::new(&[&[1], &hash(event).to_be_bytes()[..], &hash(!event).to_be_bytes()].concat())
}

fn author_prefix(author: u64) -> Vec<u8> {
    [&[3], &hash(author).to_be_bytes()[..]].concat()
}

fn tag_prefix(letter: u8, value: u64) -> Vec<u8> {
    [&[6, letter], &hash(value).to_be_bytes()[..]].concat()
}

/// Few authors write much.
fn author_of(event: u64) -> u64 {
    let even = (hash(event * 8) >> 11) as f64 / (1_u64 << 53) as f64;
    (even.powi(3) * AUTHORS as f64) as u64
}

/// SplitMix64: numbers that look like chance, the same every time.
fn hash(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Of all threads, user and system; in steps of 10 ms.
fn processor_time() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<u64>().unwrap();
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}

fn number_in(file: &str, key: &str) -> f64 {
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
