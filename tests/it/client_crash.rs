//! The client's process dies at any step, or its relay does: nothing that was taken is lost, nothing is there twice.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use sledge::client::links::Links;
use sledge::client::outbox::DurableOutbox;
use sledge::store::fault::CLIENT_POINTS;
use sledge::sync::outbox::{Content, RelayUrl};

use super::support::client::soon;
use super::support::device::{quick, signed, today};
use super::support::{Binary, Device};

pub const NSEC: &str = "nsec1vl029mgpspedva04g90vltkh6fvh240zqtv9k0t9af8935ke9laqsnlfe5";

/// A laptop: a working directory with settings, a key and a profile.
pub fn laptop(relays: &[String]) -> Binary {
    let binary = Binary::new();
    let relays = serde_json::to_string(relays).unwrap();
    binary.configure(&format!("[client]\nkey = \"me.nsec\"\nrelays = {relays}\nvisit_timeout_secs = 60\n"));
    binary.file("me.nsec", NSEC);
    binary
}

/// The contents of a chat's messages, as a laptop that knows nothing gets them from the relay.
fn contents(relays: &[String], chat: &str) -> Vec<String> {
    let shown = laptop(relays).run(&["chat", "show", chat, "--json"]).ok();
    shown.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["content"].as_str().unwrap().into()).collect()
}

/// `chat send` dies at each point that touches the disk or the relay: while it queues the write, while it signs, while the
/// relay answers. What was durable before arrives once with the next flush; what was not is not there at all.
#[test]
fn a_client_that_dies_anywhere_loses_and_doubles_nothing() {
    let relay = Binary::new();
    let serving = relay.serve();
    let relays = [format!("ws://{}", serving.addr())];
    let laptop = laptop(&relays);
    let chat = laptop.run(&["chat", "new", "crash"]).ok().trim().to_owned();
    let mut expected = Vec::new();
    let mut died_at = BTreeSet::new();
    for fault in CLIENT_POINTS.iter().flat_map(|point| (1..=3).map(move |times| format!("{point}:{times}"))) {
        if fault.starts_with("outbox.shortened") || fault.starts_with("outbox.replaced") {
            lengthen_journal(&laptop);
        }
        let mut command = laptop.command(&["chat", "send", &chat, &fault]);
        let died = !command.env("SLEDGE_FAULT", &fault).output().unwrap().status.success();
        if died {
            died_at.insert(fault.split(':').next().unwrap().to_owned());
        }
        laptop.run(&["outbox", "flush"]).ok();
        let status: Value = serde_json::from_str(&laptop.run(&["outbox", "status", "--json"]).ok()).unwrap();
        assert_eq!((&status["waiting"], &status["dead"]), (&Value::from(0), &Value::from(0)), "{fault}");
        // The journal is made shorter before anything is taken. A process that is killed loses no written bytes, so
        // what was written counts as durable here.
        let before = ["outbox.append:1", "outbox.half_written:1"].contains(&fault.as_str());
        let shortening = died && (fault.starts_with("outbox.shortened") || fault.starts_with("outbox.replaced"));
        if !before && !shortening {
            expected.push(fault);
        }
    }
    assert_eq!(contents(&relays, &chat), expected);
    let points: BTreeSet<String> = CLIENT_POINTS.iter().map(|point| (*point).to_owned()).collect();
    assert_eq!(died_at, points, "each point was passed");
}

/// Makes the journal so long that the next start writes it anew.
fn lengthen_journal(laptop: &Binary) {
    let journal = laptop.file("lengthened", "").replace("lengthened", "sledge-profile/outbox.journal");
    let mut outbox = DurableOutbox::open(Path::new(&journal), 1 << 30).unwrap();
    let relays = vec![RelayUrl::new("ws://nowhere.example")];
    let note = String::from_utf8(signed(1, 1, today(), &[], "passing").canonical().json.to_vec()).unwrap();
    for _ in 0..60 {
        let seqs = outbox.queue(vec![(Content::Event(note.clone()), relays.clone())]).unwrap();
        let change = outbox.rules_mut().withdraw(seqs[0]).unwrap();
        outbox.record(vec![change], false).unwrap();
    }
}

/// A relay is killed in the middle of a batch and started again, several times: everything is acknowledged in the end, and
/// the relay has each event once.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_dies_in_the_middle_loses_and_doubles_nothing() {
    let relay = Binary::new();
    let mut serving = relay.serve();
    let addr = serving.addr();
    let device = Device::new(1, &[&format!("ws://{addr}")]);
    for number in 0..400 {
        device.publish(1, today() - number, &[], &number.to_string());
    }
    let links = Links::start(Arc::clone(device.profile()), quick());
    for left in [330, 200, 90] {
        device.until("some of it to be sent", |status| status.waiting <= left).await;
        serving.kill();
        serving = relay.serve_on(addr);
    }
    device.until("all of it to be sent", |status| status.waiting == 0).await;
    soon("the end", links.stop()).await;
    serving.kill();
    assert_eq!(relay.exported_ids(), device.ids());
}
