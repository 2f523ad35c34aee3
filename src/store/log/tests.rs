use super::*;
use crate::store::Removal;

/// A log with `count` erased records of 64 bytes, and the folder it lies in.
fn sample(count: usize) -> (tempfile::TempDir, Log) {
    let dir = tempfile::tempdir().expect("a folder for the test");
    let log = Log::create(&dir.path().join("log"), [7; 16], None).expect("new log");
    for _ in 0..count {
        log.append(&record::erased(&EventId([9; 32]), 64)).expect("append");
    }
    (dir, log)
}

fn steps(log: &Log) -> Vec<String> {
    let mut reader = log.reader(HEADER_LEN);
    let mut all = Vec::new();
    while let Some(step) = reader.next().expect("readable") {
        all.push(match step {
            Step::Record(offset, len, _) => format!("{offset}+{len}"),
            Step::Damaged { offset, len } => format!("damaged {offset}+{len}"),
            Step::TornTail { offset, len } => format!("torn {offset}+{len}"),
        });
    }
    all
}

/// Reopened, the log gives the same records; a newer format is refused by its number.
#[test]
fn reopen_reads_the_same() {
    let (dir, log) = sample(3);
    assert_eq!(steps(&log), ["32+64", "96+64", "160+64"]);
    let reopened = Log::open(&dir.path().join("log")).expect("open");
    assert_eq!((steps(&reopened), reopened.id(), reopened.end()), (steps(&log), [7; 16], 224));
    log.file.write_all_at(&9u32.to_le_bytes(), 8).expect("write");
    let error = Log::open(&dir.path().join("log")).expect_err("newer").to_string();
    assert!(error.contains("format 9"), "{error}");
}

/// Whatever single byte of a record is flipped, that record alone is told as damaged, and the last as torn.
#[test]
fn damage_is_stepped_over_and_told() {
    let (_dir, log) = sample(3);
    for flipped in 96..160 {
        let mut byte = [0];
        log.file.read_exact_at(&mut byte, flipped).expect("read");
        log.file.write_all_at(&[byte[0] ^ 0x10], flipped).expect("write");
        assert_eq!(steps(&log), ["32+64", "damaged 96+64", "160+64"], "byte {flipped}");
        assert!(log.read(96, 64, &mut Vec::new()).is_err());
        log.file.write_all_at(&byte, flipped).expect("write");
    }
    log.file.write_all_at(&[1], 170).expect("write");
    assert_eq!(steps(&log), ["32+64", "96+64", "torn 160+64"]);
    log.cut(160).expect("cut");
    assert_eq!(steps(&log), ["32+64", "96+64"]);
}

/// However short the last write was cut, what came before is whole.
#[test]
fn every_torn_length_is_a_torn_tail() {
    let (_dir, log) = sample(2);
    for len in 97..160 {
        log.file.set_len(len).expect("cut");
        log.end.store(len, Ordering::Release);
        assert_eq!(steps(&log), ["32+64".to_owned(), format!("torn 96+{}", len - 96)]);
    }
}

/// A remove record gives back what went in.
#[test]
fn remove_record_round_trip() {
    use crate::store::index::Key;
    let key = Key::new(b"abc");
    let mut bytes = Vec::new();
    let event = crate::store::record::tests_support::stored_event();
    let removed = record::Removed::new(&event, Some(event.id), 77, 88, Removal::Vanished);
    record::push_remove(&mut bytes, &removed, [key, Key::new(b"")].iter());
    let Ok((Record::Remove(read), len)) = record::decode(&bytes) else { panic!("not a remove record") };
    assert_eq!((len, read.id, read.by), (bytes.len(), event.id, Some(event.id)));
    assert_eq!((read.offset, read.len, read.why), (77, 88, Removal::Vanished));
    assert_eq!(read.keys().collect::<Vec<_>>(), [key, Key::new(b"")]);
}
