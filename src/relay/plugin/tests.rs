#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::mpsc;

use super::*;
use crate::config::Config;
use crate::protocol::testing::{Author, NOW};

/// A plugin of the common kind, in shell: it reads a line, looks at it, and answers by the event's id. What the event says decides.
const SCRIPT: &str = r#"
while IFS= read -r line; do
    id=${line#*\"id\":\"}
    id=${id%%\"*}
    case $line in
        *\"content\":\"spam*) echo "{\"id\":\"$id\",\"action\":\"reject\",\"msg\":\"blocked: no spam\"}" ;;
        *\"content\":\"shadow*) echo "{\"id\":\"$id\",\"action\":\"shadowReject\",\"msg\":\"\"}" ;;
        *\"content\":\"odd*) echo "{\"id\":\"$id\",\"action\":\"explode\"}" ;;
        *\"content\":\"garbage*) echo "what?"; echo "{\"id\":\"$id\",\"action\":\"accept\"}" ;;
        *\"content\":\"hang*) sleep 1000 ;;
        *\"content\":\"crash*) exit 3 ;;
        *\"content\":\"lost*) ;;
        *\"content\":\"later*) later=$id ;;
        *\"content\":\"now*) echo "{\"id\":\"$id\",\"action\":\"accept\"}"; echo "{\"id\":\"$later\",\"action\":\"accept\"}" ;;
        *) echo "{\"id\":\"$id\",\"action\":\"accept\"}" ;;
    esac
done
"#;

struct Room {
    plugin: Plugin,
    _folder: tempfile::TempDir,
}

fn room(change: impl FnOnce(&mut config::Plugin, &Path)) -> Room {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("policy.sh");
    std::fs::write(&script, SCRIPT).unwrap();
    let mut settings = Config::default().plugin;
    settings.command = format!("exec sh {}", script.display());
    change(&mut settings, &script);
    Room { plugin: Plugin::start(settings).unwrap(), _folder: folder }
}

fn event(content: &str) -> Verified<Event> {
    Author::new(1).note(NOW, content)
}

impl Room {
    /// Asks without waiting; where the verdict arrives.
    fn ask(&self, content: &str) -> mpsc::Receiver<Verdict> {
        let (tell, told) = mpsc::channel();
        let done: Done = Box::new(move |_, verdict| drop(tell.send(verdict)));
        let ask = Ask { event: event(content), sender: Sender::import(), received_at: NOW, done };
        self.plugin.0.ask(lock(&self.plugin.0.state), ask);
        told
    }

    fn verdict(&self, content: &str) -> Verdict {
        soon(&self.ask(content))
    }

    /// Asks about new events until one is accepted: after a failure the plugin takes a moment to come back.
    fn until_it_is_back(&self) {
        (0..).find(|number| self.verdict(&format!("fine {number}")) == Verdict::Accept);
    }
}

fn soon(told: &mpsc::Receiver<Verdict>) -> Verdict {
    told.recv_timeout(Duration::from_secs(60)).expect("a verdict")
}

fn unavailable() -> Verdict {
    Verdict::Reject(UNAVAILABLE.to_owned())
}

/// Each action is what it says; a line that is no answer is passed over, an unknown action is a failure.
#[test]
fn actions_are_verdicts() {
    let room = room(|_, _| {});
    assert_eq!(room.verdict("hello"), Verdict::Accept);
    assert_eq!(room.verdict("spam"), Verdict::Reject("blocked: no spam".to_owned()));
    assert_eq!(room.verdict("shadow"), Verdict::ShadowReject);
    assert_eq!(room.verdict("odd"), unavailable());
    assert_eq!(room.verdict("garbage"), Verdict::Accept);
    let (_, verdict) = room.plugin.ask(event("waited for"), &Sender::import(), NOW);
    assert_eq!(verdict, Verdict::Accept);
}

/// Several events are with the plugin at a time, and its answers may come in any order.
#[test]
fn answers_come_in_any_order() {
    let room = room(|_, _| {});
    let (later, now) = (room.ask("later"), room.ask("now"));
    assert_eq!((soon(&now), soon(&later)), (Verdict::Accept, Verdict::Accept));
    let many: Vec<_> = (0..500).map(|number| room.ask(&format!("note {number}"))).collect();
    assert!(many.iter().all(|told| soon(told) == Verdict::Accept));
}

/// The same event from two senders has two verdicts.
#[test]
fn one_event_asked_about_twice() {
    let room = room(|_, _| {});
    let both = [room.ask("twice"), room.ask("twice")];
    assert!(both.iter().all(|told| soon(told) == Verdict::Accept));
}

/// A plugin that hangs is ended: what it had and what waits has its verdict, and it comes back. What the shell has
/// started ends with it.
#[test]
fn a_hanging_plugin_is_started_again() {
    for (on_failure, failure) in [(OnFailure::Reject, unavailable()), (OnFailure::Accept, Verdict::Accept)] {
        let room = room(|settings, _| {
            settings.timeout_ms = 300;
            settings.on_failure = on_failure;
            settings.in_flight_max = 2;
        });
        room.until_it_is_back();
        let stuck = [room.ask("hang"), room.ask("spam"), room.ask("behind")];
        for told in &stuck {
            assert_eq!(soon(told), failure);
        }
        room.until_it_is_back();
        (0..).find(|number| room.verdict(&format!("spam {number}")) == Verdict::Reject("blocked: no spam".to_owned()));
    }
}

/// A plugin that loses one event and answers others is not ended for it.
#[test]
fn a_lost_event_costs_nobody_else() {
    let room = room(|settings, _| settings.timeout_ms = 3_000);
    let lost = room.ask("lost");
    let mut others = 0;
    let verdict = loop {
        // The plugin gives a sign of life now and then.
        match lost.recv_timeout(Duration::from_millis(100)) {
            Ok(verdict) => break verdict,
            Err(_) => assert_eq!(room.verdict(&format!("note {others}")), Verdict::Accept),
        }
        others += 1;
    };
    assert_eq!(verdict, unavailable());
    assert_eq!(lock(&room.plugin.0.state).run.number, 1, "the same run");
}

/// A crash fails what the plugin had; it is started again, and again if it goes on crashing.
#[test]
fn a_crashed_plugin_is_started_again() {
    let room = room(|_, _| {});
    for _ in 0..2 {
        assert_eq!(room.verdict("crash"), unavailable());
        room.until_it_is_back();
    }
    assert!(lock(&room.plugin.0.state).run.number >= 3);
}

/// A command that does not exist fails every event at once, one way or the other.
#[test]
fn a_missing_command_fails_every_event() {
    for (on_failure, failure) in [(OnFailure::Reject, unavailable()), (OnFailure::Accept, Verdict::Accept)] {
        let room = room(|settings, _| {
            settings.command = "/no/such/plugin".to_owned();
            settings.on_failure = on_failure;
        });
        assert_eq!(room.verdict("hello"), failure);
        assert_eq!(room.verdict("again"), failure);
    }
}

/// A plugin that never reads fills its pipe; it is ended like one that hangs.
#[test]
fn a_plugin_that_does_not_read_is_ended() {
    let room = room(|settings, _| {
        settings.command = "exec sleep 1000".to_owned();
        settings.timeout_ms = 300;
    });
    let large = "x".repeat(100_000);
    let stuck = [room.ask(&large), room.ask("behind")];
    assert!(stuck.iter().all(|told| soon(told) == unavailable()));
}

/// Stopping gives everything its last verdict, and later questions at once.
#[test]
fn stopping_answers_everything() {
    let room = room(|_, _| {});
    let stuck = [room.ask("hang"), room.ask("behind")];
    room.plugin.stop();
    let stopping = Verdict::Reject(STOPPING.to_owned());
    assert!(stuck.iter().all(|told| soon(told) == stopping));
    assert_eq!(room.verdict("late"), stopping);
}

/// The queue is bounded: the next one waits for room and is woken.
#[test]
fn the_queue_is_bounded() {
    struct Woken(mpsc::Sender<()>);
    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            let _ = self.0.send(());
        }
    }
    let room = room(|settings, _| settings.queue_events_max = 2);
    let (tell, woken) = mpsc::channel();
    let waker = Waker::from(Arc::new(Woken(tell)));
    let mut cx = Context::from_waker(&waker);
    let _waiting = [room.ask("later"), room.ask("lost")];
    let make = || Ask { event: event("more"), sender: Sender::import(), received_at: NOW, done: Box::new(|_, _| ()) };
    assert!(room.plugin.poll_ask(&mut cx, 100, make).is_pending());
    drop(room.ask("now"));
    woken.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(lock(&room.plugin.0.state).blocked.is_empty());
}
