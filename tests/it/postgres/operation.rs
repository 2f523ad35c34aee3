//! Operating relays on a database: the commands find the one that runs on this machine.

use serde_json::{Value, json};

use crate::support::cluster::Cluster;
use crate::support::{Binary, Client, Keys, NOW};

fn binary() -> Binary {
    Binary::on_store(Cluster::shared().database())
}

/// `status`, `top` and `admin` ask the relay; where none runs, they work on the database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_find_the_relay_on_a_database() {
    let binary = binary();
    let note = Keys::new(1).note(NOW, "spam");
    binary.import([&note]);
    assert!(!binary.run(&["status"]).ok().contains("in use by"));
    assert!(binary.run(&["top", "--once"]).fails(1).contains("cannot be reached"));
    let relay = binary.serve();
    let mut client = Client::connect(relay.addr()).await;
    assert_eq!(client.query_ids(json!({})).await, [note.id.to_hex()]);
    let command = |args: &[&str]| tokio::task::block_in_place(|| binary.run(args).ok());
    let status: Value = serde_json::from_str(&command(&["status", "--json"])).unwrap();
    assert_eq!((&status["connections"], &status["events"]), (&json!(1), &json!(1)));
    assert!(!status["path"].to_string().contains("password"));
    assert!(command(&["top", "--once"]).contains("1 connections"));
    assert_eq!(command(&["admin", "banpubkey", &Keys::new(1).hex(), "spam"]), "done\n");
    assert_eq!(client.query_ids(json!({})).await, [] as [&str; 0]);
    drop(relay);
    // What it left behind leads nowhere, and nobody is misled.
    assert_eq!(command(&["admin", "listbannedpubkeys"]), format!("{}  spam\n", Keys::new(1).hex()));
}

/// A relay is replaced without a refused connection, and one that finds another in its place serves all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_on_a_database_is_replaced() {
    let binary = binary();
    let old = binary.serve();
    let addr = old.addr();
    let mut client = Client::connect(addr).await;
    let note = Keys::new(1).note(NOW, "handed on");
    client.store(&note).await;
    let serve = |args: &[&str]| tokio::task::block_in_place(|| binary.serve_with(args, &[]));
    let beside = serve(&["--listen", "127.0.0.1:0"]);
    assert!(beside.wait_for_line("control_dir").contains("sledge serve"));
    let new = serve(&["--take-over", "--listen", &addr.to_string()]);
    assert_eq!(new.addr(), addr);
    for addr in [addr, beside.addr()] {
        assert_eq!(Client::connect(addr).await.query_ids(json!({})).await, [note.id.to_hex()]);
    }
    let (status, log) = old.wait_for_end();
    assert!(status.success() && log.contains("another process takes over"), "{log}");
    client.assert_closed().await;
    let again = serve(&["--take-over", "--listen", &addr.to_string()]);
    Client::connect(again.addr()).await.assert_alive().await;
}
