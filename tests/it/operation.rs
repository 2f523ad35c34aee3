//! A running relay is looked after: settings are read again, another process takes over, the service manager is told.

use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::TryRecvError;

use serde_json::{Value, json};

use crate::http::request;
use crate::support::client::PATIENCE;
use crate::support::{Binary, Client, Keys, NOW, Serving};

const NOSTR_JSON: &str = "Accept: application/nostr+json";

async fn name_of(relay: &Serving) -> String {
    let response = request(relay.addr(), "GET / HTTP/1.1", &[NOSTR_JSON]).await;
    let document: Value = serde_json::from_str(&response.body).unwrap();
    document["name"].as_str().unwrap().to_owned()
}

/// SIGHUP puts new settings in force, names what needs a restart, and open connections stay.
#[tokio::test]
async fn sighup_reads_the_settings_again() {
    let binary = Binary::new();
    binary.configure("[info]\nname = \"before\"\n[limits]\nlimit_max = 500\n");
    let relay = binary.serve();
    let mut client = Client::connect(relay.addr()).await;
    assert_eq!(name_of(&relay).await, "before");
    binary.configure("[info]\nname = \"after\"\n[memory]\nbudget_mb = 64\n[limits]\nlimit_max = 500\n");
    relay.signal("HUP");
    let line = relay.wait_for_line("need a restart");
    assert!(line.contains("memory.budget_mb") && !line.contains("info.name"), "{line}");
    assert_eq!(name_of(&relay).await, "after");
    client.assert_alive().await;
}

/// A file that does not hold keeps the old settings, and the log says file, line and key; so does one that is gone.
#[tokio::test]
async fn a_bad_file_keeps_the_old_settings() {
    let binary = Binary::new();
    binary.configure("[info]\nname = \"good\"\n");
    let relay = binary.serve();
    binary.configure("[info]\nname = \"bad\"\n[limits]\nlimit_max = \"many\"\n");
    relay.signal("HUP");
    let line = relay.wait_for_line("the old ones stay in force");
    assert!(line.contains("sync.toml:4: limits.limit_max: must be of type integer"), "{line}");
    assert_eq!(name_of(&relay).await, "good");
    binary.configure("[info]\nname = \"mended\"\n");
    relay.signal("HUP");
    relay.wait_for_line("settings read again");
    assert_eq!(name_of(&relay).await, "mended");
}

/// A change of the file is noticed without a signal.
#[tokio::test]
async fn a_changed_file_is_noticed() {
    let binary = Binary::new();
    binary.configure("[info]\nname = \"before\"\n");
    let relay = binary.serve();
    binary.configure("[info]\nname = \"afterwards\"\n");
    let line = relay.wait_for_line("settings read again");
    assert!(line.contains("the settings file has changed") && line.contains("info.name"), "{line}");
    assert_eq!(name_of(&relay).await, "afterwards");
}

/// The limits by address follow a reload at once, also on connections that are open.
#[tokio::test]
async fn limits_follow_a_reload() {
    let binary = Binary::new();
    binary.configure("[rate]\nreqs_per_sec = 0\n");
    let relay = binary.serve();
    let mut client = Client::connect_from(relay.addr(), "192.0.2.1").await;
    for _ in 0..100 {
        client.query(json!({"limit": 0})).await;
    }
    binary.configure("[rate]\nreqs_per_sec = 1\nreqs_burst = 1\n");
    relay.signal("HUP");
    relay.wait_for_line("settings read again");
    for n in 0.. {
        client.subscribe(&n.to_string(), &[json!({"limit": 0})]).await;
        if client.wait_for(|message| message[1] == n.to_string().as_str()).await[0] == "CLOSED" {
            break;
        }
    }
}

/// The new process gets the socket: whoever connects while the store changes hands is served by it, with all that the
/// old one had acknowledged; the old one ends well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_takes_over_without_refusing_a_connection() {
    let binary = Binary::new();
    let old = binary.serve();
    let addr = old.addr();
    let note = Keys::new(1).note(NOW, "handed on");
    let mut client = Client::connect(addr).await;
    client.store(&note).await;
    // Somebody asks all the time: each request is answered, by the one or the other.
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let asking = tokio::spawn(async move {
        let mut asked = 0;
        while stopped.try_recv() != Err(TryRecvError::Disconnected) {
            assert_eq!(request(addr, "GET /healthz HTTP/1.1", &[]).await.status, 200);
            asked += 1;
        }
        asked
    });
    let new = tokio::task::block_in_place(|| binary.serve_with(&["--take-over", "--listen", &addr.to_string()], &[]));
    assert_eq!(new.addr(), addr);
    let mut newcomer = Client::connect(addr).await;
    assert_eq!(newcomer.query_ids(json!({})).await, [note.id.to_hex()]);
    drop(stop);
    assert!(asking.await.unwrap() > 0);
    let (status, log) = old.wait_for_end();
    assert!(status.success() && log.contains("another process takes over"), "{log}");
    client.assert_closed().await;
}

/// Where no relay runs there is nothing to take over, and the relay starts as ever.
#[tokio::test]
async fn taking_over_from_nobody_is_starting() {
    let binary = Binary::new();
    let relay = binary.serve_with(&["--take-over", "--listen", "127.0.0.1:0"], &[]);
    Client::connect(relay.addr()).await.assert_alive().await;
}

/// The service manager hears when the relay serves, that it lives, and that it stops.
#[tokio::test]
async fn the_service_manager_is_told() {
    let binary = Binary::new();
    let path = binary.file("notify", "");
    std::fs::remove_file(&path).unwrap();
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = |wanted: &str| {
        let mut bytes = [0; 512];
        loop {
            let len = manager.recv(&mut bytes).expect("the relay tells");
            if bytes[..len].starts_with(wanted.as_bytes()) {
                return;
            }
        }
    };
    let env = [("NOTIFY_SOCKET", path.as_str()), ("WATCHDOG_USEC", "100000")];
    let relay = binary.serve_with(&["--listen", "127.0.0.1:0"], &env);
    hear("READY=1");
    hear("WATCHDOG=1");
    relay.signal("HUP");
    hear("RELOADING=1\nMONOTONIC_USEC=");
    hear("READY=1");
    relay.signal("TERM");
    hear("STOPPING=1");
    assert!(relay.wait_for_end().0.success());
}

/// A socket that a service manager holds is used, whatever the settings say; systemd's own protocol, spoken by a shell.
#[tokio::test]
async fn a_passed_socket_is_used() {
    let binary = Binary::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let relay = binary.serve_passing(listener);
    assert_eq!(relay.addr(), addr);
    Client::connect(addr).await.assert_alive().await;
}

/// What is packaged is true: its settings are read, and the unit starts the command that there is.
#[test]
fn what_is_packaged_is_true() {
    let packaging = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
    let config = sledge::config::Config::load_file(&packaging.join("sync.toml")).unwrap();
    let unit = std::fs::read_to_string(packaging.join("sledge.service")).unwrap();
    let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)).expect(key);
    assert_eq!(config.store, format!("/var/lib/{}", value("StateDirectory=")));
    let stop_secs: u64 = value("TimeoutStopSec=").parse().unwrap();
    assert!(stop_secs > config.limits.stop_timeout().as_secs());
    let command: Vec<&str> = value("ExecStart=/usr/bin/").split(' ').collect();
    <sledge::cli::Cli as clap::Parser>::try_parse_from(command).unwrap();
}

/// Figures for Prometheus stand on their own address, in its format, and not on the public one.
#[tokio::test]
async fn metrics_have_an_address_of_their_own() {
    let binary = Binary::new();
    binary.configure("[operation]\nmetrics_listen = \"127.0.0.1:0\"\n");
    let relay = binary.serve();
    let line = relay.wait_for_line("metrics are served");
    let addr = line.split("addr=").nth(1).unwrap().trim().parse().unwrap();
    let mut client = Client::connect(relay.addr()).await;
    let note = Keys::new(1).note(NOW, "");
    client.publish(&note).await;
    client.publish(&note).await;
    let response = request(addr, "GET /metrics HTTP/1.1", &[]).await;
    assert_eq!(response.status, 200);
    for line in [
        "sledge_events_stored_total 1",
        "sledge_events_duplicate_total 1",
        "sledge_events_refused_total{reason=\"invalid\"} 0",
        "sledge_connections 1",
        "sledge_healthy 1",
        "sledge_events 1",
        "# EOF",
    ] {
        assert!(response.body.lines().any(|found| found == line), "{line} is missing:\n{}", response.body);
    }
    assert!(response.body.lines().any(|line| line.starts_with("sledge_disk_free_bytes ")));
    assert_eq!(request(addr, "GET / HTTP/1.1", &[]).await.status, 404);
    assert_eq!(request(relay.addr(), "GET /metrics HTTP/1.1", &[]).await.status, 404);
}

/// `status`, `top` and `explain` reach the running relay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_running_relay_can_be_looked_at() {
    let binary = Binary::new();
    let relay = binary.serve();
    let mut client = Client::connect(relay.addr()).await;
    client.publish(&Keys::new(1).note(NOW, "")).await;
    client.req("open", &[json!({})]).await;
    let status: Value = serde_json::from_str(&binary.run(&["status", "--json"]).ok()).unwrap();
    assert_eq!((status["figures"]["stored"].as_u64(), status["queries"]["finished"].as_u64()), (Some(1), Some(1)));
    let top = binary.run(&["top", "--once"]).ok();
    assert!(top.contains(", well\n") && top.contains("1 connections, 1 subscriptions"), "{top}");
    let plan = binary.run(&["explain", "{\"kinds\":[1]}"]).ok();
    assert!(plan.starts_with("by kind, in one stretch: 1 events ("), "{plan}");
}
