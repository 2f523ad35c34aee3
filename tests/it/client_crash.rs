//! The client's process dies at any step, or its relay does: nothing that was taken is lost, nothing is there twice.

use std::sync::Arc;

use serde_json::Value;
use sledge::client::links::Links;
use sledge::store::fault::CLIENT_POINTS;

use super::support::client::soon;
use super::support::device::{quick, today};
use super::support::{Binary, Device};

const NSEC: &str = "nsec1vl029mgpspedva04g90vltkh6fvh240zqtv9k0t9af8935ke9laqsnlfe5";

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

/// `chat send` dies at each point that touches the disk or the relay. What was durable before arrives once with the
/// next flush; what was not is not there at all, and can be written again.
#[test]
fn a_client_that_dies_anywhere_loses_and_doubles_nothing() {
    let relay = Binary::new();
    let serving = relay.serve();
    let relays = [format!("ws://{}", serving.addr())];
    let laptop = laptop(&relays);
    let chat = laptop.run(&["chat", "new", "crash"]).ok().trim().to_owned();
    // So many changes that the journal is made shorter at the next start.
    for number in 0..40 {
        laptop.run(&["chat", "send", &chat, &format!("before {number}"), "--offline"]).ok();
    }
    let mut expected: Vec<String> = (0..40).map(|number| format!("before {number}")).collect();
    for point in CLIENT_POINTS {
        let mut command = laptop.command(&["chat", "send", &chat, point]);
        let ran = command.env("SLEDGE_FAULT", point).output().unwrap();
        let died = !ran.status.success();
        assert!(died || point.ends_with("shortened") || point.ends_with("replaced"), "{point} was not passed");
        laptop.run(&["outbox", "flush"]).ok();
        let status: Value = serde_json::from_str(&laptop.run(&["outbox", "status", "--json"]).ok()).unwrap();
        assert_eq!((&status["waiting"], &status["dead"]), (&Value::from(0), &Value::from(0)), "{point}");
        let arrived = contents(&relays, &chat);
        let durable = !["outbox.append", "outbox.half_written"].contains(point);
        // A process that is killed loses no written bytes, so `outbox.written` counts as durable here.
        if durable && !(died && point.starts_with("outbox.shortened") || point.starts_with("outbox.replaced") && died) {
            expected.push((*point).to_owned());
        }
        assert_eq!(arrived, expected, "{point}");
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
