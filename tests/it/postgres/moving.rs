//! The command line on a database: the same commands, and moving between a directory and a database.

use sledge::protocol::Event;

use crate::support::cluster::Cluster;
use crate::support::stores::in_order;
use crate::support::{Binary, Client, Keys, NOW, ids};

/// Events of every kind of fate, and what is kept of them.
fn history() -> (Vec<Event>, Vec<Event>) {
    let keys = Keys::new(1);
    let gone = keys.note(NOW, "gone");
    let old = keys.draft(0, NOW).content("old").sign();
    let kept = vec![
        keys.deletion(NOW, &[("e", &gone.id.to_hex())]),
        keys.draft(0, NOW + 1).content("new").sign(),
        keys.draft(30_023, NOW).tag(["d", "x"]).tag(["t", "ü\n"]).sign(),
        keys.note(NOW, "note"),
    ];
    let mut all = kept.clone();
    all.extend([gone, old]);
    (all, kept)
}

/// import, export, query, count, status, delete; export of one store is import of the other.
#[test]
fn the_commands_work_on_a_database() {
    let (all, kept) = history();
    let (database, directory) = (Binary::on_store(Cluster::shared().database()), Binary::new());
    database.import(&all);
    assert_eq!(database.exported_ids(), sorted(ids(&kept)));
    database.import(&all);
    directory.import(&all);
    assert_eq!(database.export(), directory.export(), "byte for byte, in the same order");
    assert_eq!(database.run(&["query", "{\"kinds\":[1]}"]).ok().lines().count(), 1);
    assert_eq!(database.run(&["count", "{}"]).ok().trim(), kept.len().to_string());
    let status = database.run(&["status", "--json"]).ok();
    assert!(status.contains(&format!("\"events\":{}", kept.len())), "{status}");
    database.run(&["delete", "{\"kinds\":[1]}"]).ok();
    assert_eq!(database.run(&["count", "{}"]).ok().trim(), (kept.len() - 1).to_string());
    for command in ["compact", "verify", "backup"] {
        let args: &[&str] = if command == "backup" { &["backup", "there"] } else { &[command] };
        assert!(database.run(args).fails(2).contains("pg_dump"), "{command}");
    }
}

/// There and back again, and a second run finds everything there.
#[test]
fn migrate_there_and_back() {
    let (all, kept) = history();
    let (first, second) = (Binary::new(), Binary::new());
    first.import(&all);
    let url = Cluster::shared().database();
    let [from, to] = [first.data(), second.data()].map(|path| path.to_str().unwrap().to_owned());
    let there = first.run(&["migrate", "--from", &from, "--to", &url]).ok();
    assert!(there.starts_with("copied 4 events, 0 were there, 0 refused"), "{there}");
    let again = first.run(&["migrate", "--from", &from, "--to", &url]).ok();
    assert!(again.starts_with("copied 0 events, 4 were there, 0 refused"), "{again}");
    first.run(&["migrate", "--from", &url, "--to", &to]).ok();
    assert_eq!(second.exported_ids(), sorted(ids(&kept)));
    assert_eq!(second.export(), first.export());
}

/// `sledge serve` on a database, twice: what one relay takes, the other serves, stored and live.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_served_relays_share_a_database() {
    let binary = Binary::on_store(Cluster::shared().database());
    let (one, other) = (binary.serve(), binary.serve());
    let (mut writer, mut reader) = (Client::connect(one.addr()).await, Client::connect(other.addr()).await);
    reader.req("all", &[serde_json::json!({})]).await;
    // The relays go by the machine's clock.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let notes: Vec<Event> = (0..10).map(|n| Keys::new(1).note(now - n, "")).collect();
    writer.store_all(&notes).await;
    for note in &notes {
        assert_eq!(reader.live("all").await["id"], note.id.to_hex());
    }
    assert_eq!(reader.query_ids(serde_json::json!({"kinds": [1]})).await, in_order(&notes));
    // A decision made on the database takes effect on both, without a restart.
    binary.run(&["admin", "banpubkey", &Keys::new(2).hex(), "spam"]).ok();
    for client in [&mut writer, &mut reader] {
        let mut tries = 0;
        while client.publish(&Keys::new(2).draft(1, now).content(tries.to_string()).sign()).await.0 {
            tries += 1;
            assert!(tries < 10_000, "the ban does not arrive");
        }
    }
    for serving in [one, other] {
        serving.signal("TERM");
        assert!(serving.wait_for_end().0.success());
    }
}

fn sorted(mut ids: Vec<String>) -> Vec<String> {
    ids.sort();
    ids
}
