package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

var (
	// ErrNotLeader says that the leadership is over: the election key is gone, or another's. Nothing was written.
	ErrNotLeader = errors.New("not the leader")
	// ErrConflict says that a record is not what an Op requires. Nothing was written.
	ErrConflict = errors.New("record changed meanwhile")
)

// Election is one in which the replicas of a part of Egret stand.
type Election string

// The elections.
const (
	CrdsyncElection Election = "elections/crdsync"
	CloudElection   Election = "elections/cloud"
)

// prefix is what the keys of those who stand begin with.
func (e Election) prefix() string { return string(e) + "/" }

// Leadership is the right to write what one part of Egret owns. Two may believe in theirs at a time; etcd takes the
// writes of one.
type Leadership struct {
	client  *Client
	of      Election
	session *concurrency.Session
	key     string // of the election, whole
	rev     int64  // the key's create revision
	once    sync.Once
	lost    chan struct{}
}

// Campaign returns when this replica is elected, or with the error of ctx. id is the value of the election key, for the
// operator's eyes. The leadership is renewed while ctx lives; after that it ends by itself within ttl (whole seconds,
// rounded up), or at once by Resign. While etcd cannot be reached, it tries on.
func (c *Client) Campaign(ctx context.Context, of Election, id string, ttl time.Duration) (*Leadership, error) {
	for wait, logged := minBackoff, false; ; wait = min(2*wait, maxBackoff) {
		l, err := c.campaign(ctx, of, id, ttl)
		if err == nil {
			return l, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if errors.Is(err, rpctypes.ErrNoSpace) {
			c.reportFull(true)
		}
		if !logged {
			logged = true
			c.log.Warn("election failed, will retry", "err", err)
		}
		if !sleep(ctx, wait) {
			return nil, ctx.Err()
		}
	}
}

func (c *Client) campaign(ctx context.Context, of Election, id string, ttl time.Duration) (*Leadership, error) {
	// The election cleans up under the context of its client, without a deadline: with one that lives longer than ctx
	// it would wait for an etcd that is away. What it leaves goes with the lease.
	client := clientv3.NewCtxClient(ctx)
	client.KV, client.Lease, client.Watcher = c.etcd.KV, c.etcd.Lease, c.etcd.Watcher
	s, err := concurrency.NewSession(client, concurrency.WithTTL(int(seconds(ttl))), concurrency.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("opening a session: %w", err)
	}
	l := &Leadership{client: c, of: of, session: s, lost: make(chan struct{})}
	if err := l.run(ctx, concurrency.NewElection(s, c.key(string(of))), id); err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = l.Resign(end) // the lease ends by itself
		return nil, err
	}
	context.AfterFunc(s.Ctx(), l.lose)
	return l, nil
}

// run stands for election, and returns when it is won.
func (l *Leadership) run(ctx context.Context, e *concurrency.Election, id string) error {
	// A candidate whose lease ends while it waits would find that all keys before its own are gone: so is its own.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.session.Ctx(), cancel)()
	if err := e.Campaign(ctx, id); err != nil {
		return fmt.Errorf("standing for election: %w", err)
	}
	l.key, l.rev = e.Key(), e.Rev()
	if err := l.Commit(ctx); err != nil {
		return fmt.Errorf("standing for election: %w", err)
	}
	return nil
}

// Led reports whether a crdsync is elected, or stands for election with a key that outlives the leader's.
func (c *Client) Led(ctx context.Context) (bool, error) {
	records, err := c.List(ctx, CrdsyncElection.prefix())
	return len(records) > 0, err
}

// Lost returns a channel that is closed once the leadership is over, as far as is known: its lease was not renewed in
// time, its context ended, Commit found another leader, or Resign was called.
func (l *Leadership) Lost() <-chan struct{} { return l.lost }

// Resign ends the leadership at once, so that another replica need not wait for the TTL.
func (l *Leadership) Resign(ctx context.Context) error {
	l.lose()
	// Session.Close would revoke under the session's own context, which has ended when the process stops.
	l.session.Orphan()
	return l.client.revoke(ctx, l.session.Lease())
}

func (l *Leadership) lose() { l.once.Do(func() { close(l.lost) }) }

// Op is one change that Commit makes.
type Op struct {
	Key      string // without the Client's prefix
	Value    []byte // nil: delete the key
	Below    bool   // delete all keys that begin with Key, of which nothing is required
	Absent   bool   // the key must not exist
	Revision int64  // not 0: the key's mod revision must be this
	// Still, if not 0, makes the Op a condition and no change: no key that begins with Key may have a mod revision
	// above it. Deleted keys do not count. It is for decisions that depend on all keys with a prefix, not on one of
	// them.
	Still int64
	// Exists makes the Op a condition and no change: the key must exist.
	Exists bool
}

// Commit makes all changes in one transaction, or none: errors.Is(err, ErrNotLeader) when the leadership is over, and
// ErrConflict, with the keys, when records are not as their Ops require, ErrRefused when etcd does not take them. No
// key may occur twice, and at most 120 Ops fit; without any it tells whether the leadership stands. After another
// error, the changes may have been made.
func (l *Leadership) Commit(ctx context.Context, ops ...Op) error {
	_, err := l.CommitAt(ctx, ops...)
	return err
}

// CommitAt is Commit, and returns the revision that etcd has with the changes.
func (l *Leadership) CommitAt(ctx context.Context, ops ...Op) (revision int64, err error) {
	if len(ops) > maxTxnOps {
		return 0, fmt.Errorf("committing %d changes: at most %d fit one transaction", len(ops), maxTxnOps)
	}
	c := l.client
	ifs := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(l.key), "=", l.rev)}
	var then []clientv3.Op
	now := []clientv3.Op{clientv3.OpGet(l.key, clientv3.WithKeysOnly())}
	for _, op := range ops {
		key := c.key(op.Key)
		if op.Still != 0 {
			ifs = append(ifs, unchangedSince(key, op.Still).WithPrefix())
			now = append(now, clientv3.OpGet(key, append(clientv3.WithLastRev(), clientv3.WithKeysOnly())...))
			continue
		}
		if op.Exists {
			ifs = append(ifs, clientv3.Compare(clientv3.CreateRevision(key), ">", 0))
			now = append(now, clientv3.OpGet(key, clientv3.WithKeysOnly()))
			continue
		}
		change := clientv3.OpDelete(key)
		if op.Value != nil {
			change = clientv3.OpPut(key, string(op.Value))
		} else if op.Below {
			change = clientv3.OpDelete(key, clientv3.WithPrefix())
		}
		then = append(then, change)
		if op.Absent {
			ifs = append(ifs, absent(key))
		}
		if op.Revision != 0 {
			ifs = append(ifs, unchanged(key, op.Revision))
		}
		now = append(now, clientv3.OpGet(key, clientv3.WithKeysOnly()))
	}
	resp, err := c.txn(ctx, ifs, then, now)
	if err != nil {
		return 0, fmt.Errorf("committing %d changes: %w", len(ops), refusal(err))
	}
	if resp.Succeeded {
		return resp.Header.Revision, nil
	}
	return 0, l.refused(ops, resp)
}

// refused says why etcd refused the changes, from the keys as they were then.
func (l *Leadership) refused(ops []Op, resp *clientv3.TxnResponse) error {
	if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) == 0 || kvs[0].CreateRevision != l.rev {
		l.lose()
		return fmt.Errorf("committing %d changes: %w", len(ops), ErrNotLeader)
	}
	var errs []error
	for i, op := range ops {
		var revision int64
		if kvs := resp.Responses[i+1].GetResponseRange().Kvs; len(kvs) > 0 {
			revision = kvs[0].ModRevision
		}
		if op.Absent && revision != 0 || op.Exists && revision == 0 ||
			op.Revision != 0 && op.Revision != revision || op.Still != 0 && revision > op.Still {
			errs = append(errs, fmt.Errorf("%s: %w", op.Key, ErrConflict))
		}
	}
	return fmt.Errorf("committing %d changes: %w", len(ops), errors.Join(errs...))
}
