//! Stored queries from a streaming replica: never less than this process knows to be stored, and never without an answer.

use sledge::protocol::Event;
use sledge::store::Store;
use sledge::store::postgres::{Options, PostgresStore};

use crate::support::cluster::Cluster;
use crate::support::stores::{count, in_order, newest, query, read, row_ids};
use crate::support::{Keys, NOW, verified};

/// A replica that has caught up answers, even with the primary away; one that lags or is gone is passed over.
#[test]
fn a_replica_answers_where_it_has_caught_up() {
    let cluster = Cluster::start("");
    let url = cluster.database();
    let name = url.split(['/', '?']).nth(3).unwrap();
    let writer = PostgresStore::open(&Options::new(&url)).unwrap();
    let notes: Vec<Event> = (0..20).map(|n| Keys::new(1).note(NOW + n, "")).collect();
    writer.apply(&notes[..10].iter().map(verified).collect::<Vec<_>>(), NOW).unwrap();
    cluster.start_standby();
    let store = PostgresStore::open(&Options { read_urls: vec![cluster.standby_url(name)], ..Options::new(&url) });
    let store = store.unwrap();
    let everything = || query(&[newest("{}", 100)], NOW);
    let seen = || row_ids(&read(&store, everything(), usize::MAX).0);
    let position = "SELECT next FROM sledge.head";
    while cluster.standby_sql(name, position) != cluster.sql(name, position) {}
    cluster.restart(|| {
        assert_eq!(seen(), in_order(&notes[..10]), "from the replica: the primary is away");
        assert_eq!(count(&store, everything()), 10);
        assert!(store.contains(&notes[0].id).is_err(), "what must be exact is asked of the primary");
    });
    cluster.standby_sql("postgres", "SELECT pg_wal_replay_pause()");
    while store.apply(&notes[10..].iter().map(verified).collect::<Vec<_>>(), NOW).is_err() {}
    assert_eq!(seen(), in_order(&notes), "one's own writes are seen, whatever the replica has");
    assert_eq!(cluster.standby_sql(name, "SELECT count(*) FROM sledge.events"), "10", "it lags");
    store.remove(&[notes[0].id], sledge::store::Removal::Operator).unwrap();
    assert_eq!(seen(), in_order(&notes[1..]), "so are removals");
    cluster.stop_standby();
    assert_eq!(seen(), in_order(&notes[1..]), "a replica that is gone is passed over");
}
