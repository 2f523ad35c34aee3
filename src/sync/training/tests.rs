//! Training data: consent, one rating a rater, status upwards only, withdrawal.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::protocol::Verified;
use crate::sync::Absorbed;
use crate::sync::clock::Hlc;
use crate::sync::shape::Unsigned;
use crate::sync::testing::{Desk, NOW_MS};

fn terms(curators: &[PublicKey]) -> Terms {
    Terms { quality: Quality::new(80), license: "CC-BY-4.0".to_owned(), curators: curators.to_vec() }
}

fn contribute(desk: &mut Desk, text: &str) -> Verified<Event> {
    let op = desk.state.training.contribute(&desk.state.me(), text, terms(&[]), Consent::to(text), []).unwrap();
    desk.say(op, NOW_MS)
}

fn quality(percent: u8) -> Quality {
    Quality::new(percent).unwrap()
}

/// The event has every tag of the documented shape, and is read back as what was written.
#[test]
fn a_contribution_is_read_back() {
    let (mut giver, mut curator) = (Desk::new(1, 1), Desk::new(2, 2));
    let terms = terms(&[curator.state.me()]);
    let op = giver.state.training.contribute(&giver.state.me(), "text", terms.clone(), Consent::to("text"), []);
    let event = giver.say(op.unwrap(), NOW_MS);
    assert_eq!((event.kind, event.content.as_str()), (CONTRIBUTION, "text"));
    let value = |name: &str| event.tags.values(name).next().unwrap().to_owned();
    assert_eq!((value("t"), value("quality"), value("license")), ("training".into(), "80".into(), "CC-BY-4.0".into()));
    assert_eq!(value("x"), faster_hex::hex_string(&sha256("text")));
    assert!(event.is_protected() && crate::sync::shape::names(&event, &curator.state.me()));
    assert_eq!(curator.take(&event), Absorbed::Taken);
    assert_eq!(curator.state.training.contribution(&event.id).unwrap().terms, terms);
}

/// Consent is for one text; a chat must be opened for training; the same text is given once.
#[test]
fn nothing_is_given_without_consent() {
    let mut giver = Desk::new(1, 1);
    let me = giver.state.me();
    let training = &giver.state.training;
    let other = training.contribute(&me, "text", terms(&[]), Consent::to("other"), []);
    assert_eq!(other, Err(NotContributed::OtherText));
    let key = crate::sync::chat::ChatKey { owner: me, id: "c".to_owned() };
    let send = giver.state.chat_view([]).send(&key, "m", "user", "text", serde_json::Value::Null).unwrap();
    giver.say(send, NOW_MS);
    let offer = |giver: &Desk| {
        let view = giver.state.chat_view([]);
        let message = view.messages(&key).remove(0).message;
        giver.state.training.contribute_message(&view.head(&key), &message, terms(&[]), Consent::to("text"), [])
    };
    assert_eq!(offer(&giver), Err(NotContributed::NoOptIn));
    let opt_in = giver.state.chat_view([]).set_training_opt_in("c", true);
    giver.say(opt_in, NOW_MS);
    let op = offer(&giver).unwrap();
    let draft = giver.draft(op.clone(), NOW_MS);
    let again = giver.state.training.contribute(&me, "text", terms(&[]), Consent::to("text"), [&draft]);
    assert_eq!(again, Err(NotContributed::Repeated));
    giver.say(op, NOW_MS);
    assert_eq!(offer(&giver), Err(NotContributed::Repeated));
}

/// The latest rating of each rater counts, also when written in the same second; one's own does not.
#[test]
fn one_rating_a_rater() {
    let mut giver = Desk::new(1, 1);
    let given = contribute(&mut giver, "text");
    let mut raters = [Desk::new(2, 2), Desk::new(3, 3)];
    let mut events = vec![];
    for (rater, percents) in raters.iter_mut().zip([[10, 90], [20, 71]]) {
        rater.take(&given);
        for percent in percents {
            let op = rater.state.training.rate(&rater.state.me(), &given.id, quality(percent)).unwrap();
            events.push(rater.say(op, NOW_MS));
        }
    }
    assert_eq!(giver.state.training.rate(&giver.state.me(), &given.id, quality(100)), None);
    let own = TrainingOp::Rate { target: given.id, author: giver.state.me(), quality: quality(100), after: None };
    events.push(giver.say(Op::Training(own), NOW_MS));
    giver.take_all(events.iter().rev());
    let ratings = giver.state.training.ratings(&given.id);
    assert_eq!(ratings.values().map(|quality| quality.percent()).sum::<u8>(), 161);
    assert_eq!(giver.state.training.aggregate(&given.id), Some(Aggregate { rank: quality(81), ratings: 2 }));
}

/// Marks only go up, only the operator's count, and no deletion undoes them; aggregates are published once.
#[test]
fn status_is_merged_by_maximum() {
    let (mut giver, mut operator) = (Desk::new(1, 1), Desk::new(9, 9));
    let given = contribute(&mut giver, "text");
    operator.take(&given);
    let (by, of) = (operator.state.me(), giver.state.me());
    let mark = |status| TrainingOp::Mark { target: given.id, author: of, status };
    let marks = [Status::Approved, Status::Rejected].map(|status| operator.say(Op::Training(mark(status)), NOW_MS));
    assert_eq!(operator.state.training.mark_as(&by, &given.id, Status::Rejected), None);
    let deletion =
        Deletion { training: true, addresses: vec![], ids: vec![marks[0].id], not_before: 0, readers: vec![] };
    let deletion = operator.say(Op::Delete(deletion), NOW_MS + 5_000);
    let own = giver.say(Op::Training(mark(Status::Rewarded)), NOW_MS);
    giver.take_all([&deletion, &marks[1], &own, &marks[0]]);
    assert_eq!(giver.state.training.status(&by, &given.id), Status::Approved);
    let mut rater = Desk::new(2, 2);
    rater.take(&given);
    let rating = rater.state.training.rate(&rater.state.me(), &given.id, quality(50)).unwrap();
    operator.take(&rater.say(rating, NOW_MS));
    let op = operator.state.training.publish_aggregate(&by, &given.id).unwrap();
    let aggregate = operator.say(op, NOW_MS);
    assert_eq!(operator.state.training.publish_aggregate(&by, &given.id), None);
    giver.take(&aggregate);
    let published = giver.state.training.published_aggregate(&by, &given.id);
    assert_eq!(published, Some(Aggregate { rank: quality(50), ratings: 1 }));
}

/// A withdrawn text is gone in either order of arrival; a stranger withdraws nothing (T6).
#[test]
fn t06_withdrawal_is_the_givers() {
    let (mut giver, mut stranger) = (Desk::new(1, 1), Desk::new(2, 2));
    let given = contribute(&mut giver, "text");
    let foreign = Deletion { training: true, addresses: vec![], ids: vec![given.id], not_before: 0, readers: vec![] };
    let foreign = stranger.say(Op::Delete(foreign), NOW_MS + 1_000);
    giver.take(&foreign);
    let op = giver.state.training.withdraw(&giver.state.me(), &given.id).unwrap();
    let withdrawal = giver.say(op, NOW_MS);
    for order in [[&given, &foreign, &withdrawal], [&withdrawal, &foreign, &given]] {
        let mut other = Desk::new(3, 3);
        other.take_all(order);
        assert_eq!(other.state.training.contributions().count(), 0);
    }
    let mut other = Desk::new(3, 3);
    other.take_all([&foreign, &given]);
    assert_eq!(other.state.training.contributions().count(), 1);
}

/// What is not exactly as documented is no fact.
#[test]
fn malformed_training_data() {
    let mut giver = Desk::new(1, 1);
    let given = contribute(&mut giver, "text");
    let target = given.id;
    let stamp = Hlc::at(NOW_MS, Default::default());
    let rating = TrainingOp::Rate { target, author: given.pubkey, quality: quality(50), after: None }.build(stamp);
    let contribution = TrainingOp::Contribute { content: "t".into(), terms: terms(&[]) }.build(stamp);
    let mut check = |good: &Unsigned, name: &str, value: Option<&str>| {
        let mut bad = good.clone();
        bad.tags.retain_mut(|tag| {
            tag[0] != name
                || value.is_some_and(|value| {
                    tag[1] = value.to_owned();
                    true
                })
        });
        let event = giver.sign(&bad);
        let answer = giver.take(&event);
        assert!(matches!(answer, Absorbed::Invalid(_) | Absorbed::NotOurs), "{name} {value:?}: {answer:?}");
    };
    for value in [None, Some("101"), Some("-1"), Some("x"), Some("90")] {
        check(&rating, "quality", value);
    }
    check(&rating, "e", None);
    check(&rating, "e", Some("ab"));
    check(&contribution, "x", None);
    check(&contribution, "x", Some("00"));
    check(&contribution, "t", None);
    check(&contribution, "license", None);
    check(&contribution, "quality", Some("101"));
}
