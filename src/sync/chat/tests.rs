//! Chats: what merges how, in which order messages stand, and what is refused.
#![allow(clippy::unwrap_used)]

use serde_json::json;

use super::*;
use crate::protocol::{Event, Verified};
use crate::sync::Absorbed;
use crate::sync::draft::{Draft, Op};
use crate::sync::testing::{Desk, NOW_MS};

fn chat(desk: &Desk) -> ChatKey {
    ChatKey { owner: desk.state.me(), id: "c:1".to_owned() }
}

fn send(desk: &mut Desk, id: &str, at_ms: u64) -> Verified<Event> {
    let op = desk.state.chat_view([]).send(&chat(desk), id, "user", &format!("text of {id}"), Value::Null).unwrap();
    desk.say(op, at_ms)
}

fn shown(desk: &Desk) -> Vec<(String, bool)> {
    let messages = desk.state.chat_view([]).messages(&chat(desk));
    messages.into_iter().map(|view| (view.message.id, view.branch)).collect()
}

fn row(id: &str, branch: bool) -> (String, bool) {
    (id.to_owned(), branch)
}

/// Two devices write at the same time; both messages stay, and the second of them is flagged. The next one joins them.
#[test]
fn concurrent_messages_are_kept_and_flagged() {
    let (mut a, mut b) = (Desk::new(1, 1), Desk::new(1, 2));
    let first = send(&mut a, "m1", NOW_MS);
    b.take(&first);
    let from_a = send(&mut a, "m2", NOW_MS + 5_000);
    let from_b = send(&mut b, "m3", NOW_MS + 2_000);
    a.take(&from_b);
    b.take(&from_a);
    let joined = send(&mut b, "m4", NOW_MS + 6_000);
    a.take(&joined);
    let expected = [row("m1", false), row("m3", false), row("m2", true), row("m4", false)];
    assert_eq!((shown(&a), shown(&b)), (expected.to_vec(), expected.to_vec()));
    let last = a.state.chat_view([]).messages(&chat(&a)).pop().unwrap();
    assert_eq!(last.message.parents, ["m2", "m3"]);
}

/// An edit keeps the place and wins over what its writer saw, also within one second and from a slow clock.
#[test]
fn law_9_an_edit_wins_over_what_it_edits() {
    let (mut a, mut b) = (Desk::new(1, 1), Desk::new(1, 2));
    let first = send(&mut a, "m1", NOW_MS);
    let second = send(&mut a, "m2", NOW_MS + 100);
    let mut events = vec![first, second];
    for (text, at_ms) in [("one", NOW_MS), ("two", NOW_MS - 86_400_000), ("three", NOW_MS)] {
        b.take_all(&events);
        let op = b.state.chat_view([]).edit(&chat(&b), "m1", text).unwrap();
        let edit = b.say(op, at_ms);
        assert!(edit.created_at > events.last().unwrap().created_at || events.len() == 2);
        events.push(edit);
    }
    a.take_all(events.iter().rev());
    let messages = a.state.chat_view([]).messages(&chat(&a));
    let texts: Vec<&str> = messages.iter().map(|view| view.message.content.as_str()).collect();
    assert_eq!(texts, ["three", "text of m2"]);
}

/// A deletion wins at equal time, whichever comes first; an edit that is later brings the message back.
#[test]
fn law_5_deletion_wins_at_equal_time() {
    let mut a = Desk::new(1, 1);
    let message = send(&mut a, "m1", NOW_MS);
    let later = a.state.chat_view([]).edit(&chat(&a), "m1", "later").unwrap();
    let op = a.state.chat_view([]).delete(&chat(&a), "m1").unwrap();
    let deletion = a.say(op, NOW_MS);
    assert_eq!(deletion.created_at, message.created_at);
    assert_eq!(shown(&a), []);
    let later = a.build(&[&Desk::draft_at(later, Hlc::at(NOW_MS + 9_000, a.clock.device()))]).unwrap();
    for order in [[&message, &deletion], [&deletion, &message]] {
        let mut b = Desk::new(1, 2);
        b.take_all(order);
        assert_eq!(shown(&b), []);
        b.take(&later);
        assert_eq!(shown(&b), [row("m1", false)]);
        assert_eq!(b.state.chat_view([]).delete(&chat(&b), "m2"), Err(ChatError::NoMessage));
    }
}

/// Fields of a head written on two devices are both there; the device that knows more says it again, once.
#[test]
fn heads_merge_field_by_field() {
    let (mut a, mut b) = (Desk::new(1, 1), Desk::new(1, 2));
    let view = |desk: &Desk| desk.state.chat_view([]).head(&chat(desk));
    let title = a.say(a.state.chat_view([]).set_title("c:1", "Title"), NOW_MS);
    let archived = b.say(b.state.chat_view([]).set_archived("c:1", true), NOW_MS + 1);
    a.take(&archived);
    b.take(&title);
    for desk in [&a, &b] {
        assert_eq!((view(desk).title(), view(desk).is_archived()), (Some("Title"), true));
        assert_eq!(desk.state.due([]).len(), 1, "neither event says both");
    }
    let merged = a.say(a.state.due([]).remove(0), NOW_MS + 2);
    b.take(&merged);
    assert!(a.state.due([]).is_empty() && b.state.due([]).is_empty());
}

/// A deleted chat takes with it what was written until then, also where another device says it again later.
#[test]
fn a_deleted_head_stays_deleted() {
    let (mut a, mut b) = (Desk::new(1, 1), Desk::new(1, 2));
    let title = a.say(a.state.chat_view([]).set_title("c:1", "Title"), NOW_MS);
    b.take(&title);
    let deletion = a.state.chat_view([]).delete_chat("c:1").remove(0);
    let deletion = a.say(deletion, NOW_MS + 5_000);
    // b does not know yet.
    let archived = b.say(b.state.chat_view([]).set_archived("c:1", true), NOW_MS + 9_000);
    for order in [[&title, &deletion, &archived], [&archived, &title, &deletion], [&deletion, &archived, &title]] {
        let mut c = Desk::new(1, 3);
        c.take_all(order);
        let head = c.state.chat_view([]).head(&chat(&c));
        assert_eq!((head.title(), head.is_archived()), (None, true));
        assert!(c.state.due([]).is_empty());
    }
}

/// What waits in the outbox is seen at once, told by one event with its edits, and overtaken by what relays prefer.
#[test]
fn drafts_are_seen_and_told_together() {
    let mut a = Desk::new(1, 1);
    let key = chat(&a);
    let first = a.state.chat_view([]).send(&key, "m1", "user", "first", json!({"k": 1})).unwrap();
    let mut drafts = vec![a.draft(first, NOW_MS)];
    let edit = a.state.chat_view(&drafts).edit(&key, "m1", "edited").unwrap();
    drafts.push(a.draft(edit, NOW_MS + 3_000));
    let title = a.state.chat_view(&drafts).set_title("c:1", "T");
    drafts.push(a.draft(title, NOW_MS + 4_000));
    let view = a.state.chat_view(&drafts).messages(&key);
    assert_eq!((view[0].message.content.as_str(), view[0].pending, view.len()), ("edited", true, 1));
    assert_eq!(a.state.chat_view(&drafts).list().len(), 1);
    assert_eq!(drafts[0].merge_key(), drafts[1].merge_key());
    let told = a.build(&[&drafts[0], &drafts[1]]).unwrap();
    assert_eq!(told.created_at, NOW_MS / 1000 + 3);
    a.take(&told);
    let alone = a.state.chat_view([]).messages(&key);
    assert_eq!((alone[0].message.stamp.wall_ms, alone[0].message.meta.clone()), (NOW_MS, json!({"k": 1})));
    let deletion = a.state.chat_view([]).delete(&key, "m1").unwrap();
    drafts = vec![a.draft(deletion, NOW_MS + 5_000)];
    assert!(a.state.chat_view(&drafts).messages(&key).is_empty());
    assert_eq!(a.state.chat_view(&drafts).edit(&key, "m1", "x"), Err(ChatError::NoMessage));
}

/// A shared chat: the reader can read and answer; a stranger's message in it does not count.
#[test]
fn shared_chats_have_their_readers() {
    let (mut owner, mut guest, mut stranger) = (Desk::new(1, 1), Desk::new(2, 2), Desk::new(3, 3));
    let key = chat(&owner);
    let share = owner.state.chat_view([]).share("c:1", &[guest.state.me()]);
    let head = owner.say(share, NOW_MS);
    let message = send(&mut owner, "m1", NOW_MS + 1);
    guest.take_all([&head, &message]);
    assert_eq!(stranger.take(&message), Absorbed::Invalid("not sealed for this key"));
    let answer = guest.state.chat_view([]).send(&key, "m2", "user", "hi", Value::Null).unwrap();
    let answer = guest.say(answer, NOW_MS + 2);
    let intruder = stranger.state.chat_view([]).send(&key, "m3", "user", "spam", Value::Null).unwrap();
    let intruder = stranger.say(intruder, NOW_MS + 3);
    owner.take_all([&answer, &intruder]);
    let expected = [row("m1", false), row("m2", false)];
    assert_eq!(shown(&owner), expected);
    assert_eq!(owner.state.chat_view([]).edit(&key, "m2", "x"), Err(ChatError::NotYours));
    let of_guest = guest.state.chat_view([]).messages(&key);
    assert_eq!(of_guest.len(), 2);
}

/// Validity is judged from the event alone: stamps beyond `created_at`, other versions, wrong addresses.
#[test]
fn law_7_invalid_events_are_named() {
    let mut a = Desk::new(1, 1);
    let key = chat(&a);
    let op = a.state.chat_view([]).send(&key, "m1", "user", "x", Value::Null).unwrap();
    let draft = Desk::draft_at(op, Hlc::at(NOW_MS, a.clock.device()));
    let good = a.state.build(&[&draft], a.clock.device(), &a.cipher).unwrap().unwrap();
    let mut check = |change: &dyn Fn(&mut Unsigned), expected: Absorbed| {
        let mut unsigned = good.clone();
        change(&mut unsigned);
        let event = a.sign(&unsigned);
        assert_eq!(a.take(&event), expected);
    };
    let seal = |plain: &str| cipher::seal_for(&Desk::new(1, 9).cipher, &[], plain).unwrap().content;
    check(&|event| event.created_at -= 1, Absorbed::Invalid("the stamp lies after the event's created_at"));
    check(&|event| event.content = "x".into(), Absorbed::Invalid("not sealed for this key"));
    check(&|event| event.content = seal("{}"), Absorbed::Invalid("the content is not that of a message"));
    check(&|event| event.tags[0][1] = "oa:m:x".into(), Absorbed::Invalid("the d tag of a message ends with its id"));
    check(&|event| event.tags[0][1] = "x".into(), Absorbed::Invalid("the d tag of a message starts with oa:m:"));
    let no_head = Absorbed::Invalid("a message names the head of its chat in an a tag");
    check(&|event| event.tags[1][1] = "x".into(), no_head);
    check(&|event| event.tags[0][1] = "oa:m:other:m1".into(), no_head);
    check(&|event| event.tags.retain(|tag| tag[0] != "L"), Absorbed::NotOurs);
    check(
        &|event| {
            event.tags.iter_mut().for_each(|tag| {
                if tag[0] == "l" {
                    tag[1] = "chat.msg/2".into()
                }
            })
        },
        Absorbed::NotOurs,
    );
    check(&|_| (), Absorbed::Taken);
}

/// Broken writers: parents in a circle, a message that follows itself, parents that are gone. All are shown, once.
#[test]
fn odd_parents_lose_nothing() {
    let owner = Desk::new(1, 1).state.me();
    let message = |id: &str, at: u64, parents: &[&str]| Message {
        chat: ChatKey { owner, id: "c".to_owned() },
        author: owner,
        id: id.to_owned(),
        role: "user".to_owned(),
        content: String::new(),
        created_at_ms: at,
        stamp: Hlc::at(at, Default::default()),
        parents: parents.iter().map(|parent| (*parent).to_owned()).collect(),
        meta: Value::Null,
        readers: Vec::new(),
    };
    let check = |messages: &[Message], expected: &[(&str, bool)]| {
        let placed = order::order(messages);
        let placed: Vec<(&str, bool)> =
            placed.iter().map(|placed| (placed.message.id.as_str(), placed.branch)).collect();
        assert_eq!(placed, expected);
    };
    check(
        &[message("a", 3, &["b"]), message("b", 2, &["a"]), message("c", 1, &["c"])],
        &[("c", false), ("b", true), ("a", false)],
    );
    check(&[message("a", 1, &[]), message("b", 2, &["gone"])], &[("a", false), ("b", false)]);
    check(&[message("a", 9, &[]), message("b", 2, &["a"])], &[("a", false), ("b", false)]);
}

/// Ids and lengths are checked before anything is written.
#[test]
fn commands_that_make_no_sense() {
    let mut a = Desk::new(1, 1);
    send(&mut a, "m1", NOW_MS);
    let view = a.state.chat_view([] as [&Draft; 0]);
    let send = |id: &str, text: &str| view.send(&chat(&a), id, "user", text, Value::Null);
    assert_eq!(send("m1", ""), Err(ChatError::IdTaken));
    for bad in ["", "a:b", &"x".repeat(65)] {
        assert_eq!(send(bad, ""), Err(ChatError::BadId));
    }
    assert_eq!(send("m2", &"\n".repeat(40_000)), Err(ChatError::TooLong));
    let Ok(Op::Message(longest)) = send("m2", &"x".repeat(57_000)) else { panic!("it fits") };
    assert!(a.build(&[&Desk::draft_at(Op::Message(longest), Hlc::at(NOW_MS, a.clock.device()))]).is_some());
}
