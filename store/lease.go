package store

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

// ErrLeaseLost says that etcd does not know the lease: it ended, or was revoked, and every key under it is gone.
var ErrLeaseLost = errors.New("lease lost")

// ErrChanged says that a lock, or the agent's record, is not under the lease any more, or not as it was seen.
var ErrChanged = errors.New("a lock or the agent's record has changed meanwhile")

// Lease is an etcd lease that lives while it is renewed. It is safe for concurrent use.
type Lease struct {
	client   *Client
	id       clientv3.LeaseID
	ttl      time.Duration
	reported bool // the log says that it is not renewed, or that etcd is lost; only report uses it
	warned   bool // that line is this lease's

	mu    sync.Mutex // guards what follows
	valid time.Time
	lost  bool
}

// Grant takes a new lease. etcd counts in whole seconds, so a fraction of one is rounded up, and it raises what is
// below its floor (2 s with its usual election timeout): TTL says what it is in the end.
func (c *Client) Grant(ctx context.Context, ttl time.Duration) (*Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	sent := time.Now()
	resp, err := c.etcd.Grant(ctx, seconds(ttl))
	if errors.Is(err, rpctypes.ErrNoSpace) {
		c.reportFull(true)
	}
	if err != nil {
		return nil, fmt.Errorf("granting a lease of %v: %w", ttl, err)
	}
	length := time.Duration(resp.TTL) * time.Second
	return &Lease{client: c, id: resp.ID, ttl: length, valid: sent.Add(length)}, nil
}

// Adopt takes over a lease that was granted to another process, by renewing it. errors.Is(err, ErrLeaseLost): it is
// gone. Nothing in etcd keeps two processes from adopting one lease: that there is one agent on each node does.
func (c *Client) Adopt(ctx context.Context, id int64) (*Lease, error) {
	l := &Lease{client: c, id: clientv3.LeaseID(id)}
	if err := l.Renew(ctx); err != nil {
		return nil, err
	}
	return l, nil
}

// seconds rounds up, since a lease must not end before its holder thinks so.
func seconds(d time.Duration) int64 { return max(int64((d+time.Second-1)/time.Second), 1) }

// ID returns the lease id; FormatLease prints it.
func (l *Lease) ID() int64 { return int64(l.id) }

// TTL returns for how long a renewal keeps the lease.
func (l *Lease) TTL() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ttl
}

// Renew renews the lease with one request. errors.Is(err, ErrLeaseLost): it is gone, for good. Any other error: nothing
// is known, try again.
func (l *Lease) Renew(ctx context.Context) error {
	_, err := l.renew(ctx, nil)
	return err
}

// renew is Renew; sent is when the first request was. It asks by the stream first, if there is one.
func (l *Lease) renew(ctx context.Context, stream *renewals) (sent time.Time, err error) {
	if l.isLost() {
		return sent, l.errLost()
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	sent = time.Now()
	after, err := elsewhereAfter, errRenewals
	var resp *pb.LeaseKeepAliveResponse
	if stream != nil {
		resp, err = stream.ask(ctx)
		after = stream.after
	}
	if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		resp, err = retryElsewhere(ctx, l.client.elsewhere(after), func(ctx context.Context) (*pb.LeaseKeepAliveResponse, error) {
			r, err := l.client.etcd.KeepAliveOnce(ctx, l.id)
			if err != nil {
				return nil, err
			}
			return &pb.LeaseKeepAliveResponse{Header: r.ResponseHeader, ID: int64(r.ID), TTL: r.TTL}, nil
		})
	}
	if err != nil {
		return sent, fmt.Errorf("renewing lease %s: %w", egress.FormatLease(l.ID()), l.known(err))
	}
	l.client.raise(resp.GetHeader().GetRevision())
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lost {
		return sent, l.errLost()
	}
	l.ttl = time.Duration(resp.TTL) * time.Second
	if until := sent.Add(l.ttl); until.After(l.valid) {
		l.valid = until
	}
	return sent, nil
}

// Valid returns until when etcd certainly keeps the lease, unless somebody revokes it: the TTL after the last confirmed
// request was sent, on the monotonic clock. It is the zero time after ErrLeaseLost and once Revoke was called.
func (l *Lease) Valid() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.valid
}

// Confirmation is what Confirm returns: at Sent nobody had revoked the lease.
type Confirmation struct {
	Sent time.Time // on the monotonic clock
	// Restores is how often this Client had seen etcd restored or replaced before it asked. The answer is of the etcd
	// after the last of them.
	Restores int
}

// Confirm reads from etcd whether the key agents/<node> is under the lease, and whether there is a suspicion against
// the node. It deletes the suspicion and reads again. The read is linearizable, unlike a renewal, which a partitioned
// leader of etcd still grants until it notices. errors.Is(err, ErrLeaseLost): the lease is gone. After any other error
// its state is not known.
func (l *Lease) Confirm(ctx context.Context, node string) (c Confirmation, err error) {
	record, suspicion := l.client.key(AgentKey(node)), l.client.key(SuspicionKey(node))
	under := clientv3.Compare(clientv3.LeaseValue(record), "=", l.id)
	asked := l.client.heads.ask()
	c.Sent = time.Now()
	// of a key alone there is no lease
	resp, err := l.client.etcd.Txn(ctx).If(under, absent(suspicion)).Else(clientv3.OpGet(record)).Commit()
	if err == nil && !resp.Succeeded {
		if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 && kvs[0].Lease == l.ID() {
			c.Sent = time.Now()
			resp, err = l.client.etcd.Txn(ctx).If(under).Then(clientv3.OpDelete(suspicion)).Commit()
		}
	}
	if err == nil {
		c.Restores, err = l.client.heads.answered(asked, resp.Header)
		l.client.newest.Store(resp.Header.Revision)
	}
	if err != nil {
		return c, fmt.Errorf("confirming lease %s: %w", egress.FormatLease(l.ID()), err)
	}
	if !resp.Succeeded {
		return c, errors.Join(fmt.Errorf("confirming lease %s: %s is not under it", egress.FormatLease(l.ID()), AgentKey(node)), l.Renew(ctx))
	}
	if l.isLost() {
		return c, l.errLost()
	}
	return c, nil
}

// keys returns the keys under the lease.
func (l *Lease) keys(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := retryElsewhere(ctx, l.client.elsewhere(impatient), func(ctx context.Context) (*clientv3.LeaseTimeToLiveResponse, error) {
		return l.client.etcd.TimeToLive(ctx, l.id, clientv3.WithAttachedKeys())
	})
	if err != nil {
		return nil, fmt.Errorf("reading the keys of lease %s: %w", egress.FormatLease(l.ID()), err)
	}
	out := make([]string, len(resp.Keys))
	for i, k := range resp.Keys {
		out[i] = string(k)
	}
	return out, nil
}

// Owned returns the egress IPs whose locks are under the lease.
func (l *Lease) Owned(ctx context.Context) ([]netip.Addr, error) {
	keys, err := l.keys(ctx)
	var out []netip.Addr
	for _, key := range keys {
		if ip, ok := l.client.lockOf(key); ok {
			out = append(out, ip)
		}
	}
	return out, err
}

// Renumber writes the record of the node's agent and the locks of the egress IPs, which are under the lease, once more,
// which gives them new revisions: requests of a former process that are still on their way require the old ones, and
// fail. A full etcd takes neither, and all stays as it is. errors.Is(err, ErrChanged): a lock, or the record, is not
// under the lease any more.
func (l *Lease) Renumber(ctx context.Context, node string, ips []netip.Addr) error {
	keys := []string{l.client.key(AgentKey(node))}
	for _, ip := range ips {
		keys = append(keys, l.client.key(OwnerKey(ip)))
	}
	for batch := range slices.Chunk(keys, maxTxnOps) {
		var ifs []clientv3.Cmp
		var then []clientv3.Op
		for _, key := range batch {
			ifs = append(ifs, clientv3.Compare(clientv3.LeaseValue(key), "=", l.id))
			then = append(then, clientv3.OpPut(key, "", clientv3.WithIgnoreValue(), clientv3.WithLease(l.id)))
		}
		done, err := l.client.txn(ctx, ifs, then, nil)
		if errors.Is(err, rpctypes.ErrNoSpace) {
			return nil
		}
		if err == nil && !done.Succeeded {
			err = ErrChanged
		}
		if err != nil {
			return fmt.Errorf("renumbering the keys of lease %s: %w", egress.FormatLease(l.ID()), err)
		}
	}
	return nil
}

// lockOf returns the egress IP whose lock a key is, prefix included.
func (c *Client) lockOf(key string) (netip.Addr, bool) {
	text, ok := strings.CutPrefix(key, c.key(OwnerPrefix))
	if !ok {
		return netip.Addr{}, false
	}
	ip, err := netip.ParseAddr(text)
	return ip, err == nil
}

// MoveTo moves every key of the lease to another one, and writes the agent's record as given. Locks of IPs for which
// keep is false are given back unused, so the next owner waits. A peer that revokes the former lease, on what it read
// before, then ends no key. The former lease is left to expire. moved, if not nil, is called once the record has moved,
// and with it all locks but those that came meanwhile. After an error, which may be that of moved, keys may be under
// either lease.
func (l *Lease) MoveTo(ctx context.Context, next *Lease, a egress.Agent, keep func(netip.Addr) bool, moved func() error) error {
	return l.moveTo(ctx, next, a, keep, func() {}, moved)
}

// moveTo is MoveTo; listed is called when the keys were listed for the first time.
func (l *Lease) moveTo(ctx context.Context, next *Lease, a egress.Agent, keep func(netip.Addr) bool, listed func(), moved func() error) error {
	a.Lease = egress.FormatLease(next.ID())
	v, err := Encode(a)
	if err == nil {
		err = l.moveAll(ctx, l, next, a.Node, v, keep, listed)
	}
	if err == nil && moved != nil {
		err = moved()
	}
	if err == nil {
		// Nobody hands over to an agent whose record is under another lease, so this has all locks that came before.
		err = l.moveAll(ctx, next, next, a.Node, v, keep, func() {})
	}
	if err != nil {
		return fmt.Errorf("moving the keys of lease %s to %s: %w", egress.FormatLease(l.ID()), egress.FormatLease(next.ID()), err)
	}
	return nil
}

// moveAll moves the keys that are under the lease, of which the record of the node's agent is the last. It is under its;
// where that is next, the locks alone move.
func (l *Lease) moveAll(ctx context.Context, its, next *Lease, node string, v []byte, keep func(netip.Addr) bool, listed func()) error {
	listed = sync.OnceFunc(listed)
	record, asked := l.client.key(AgentKey(node)), false
	return Insist(ctx, func(ctx context.Context) error {
		keys, err := l.keys(ctx)
		if err != nil {
			return err
		}
		listed()
		at, revision, err := l.client.recordAt(ctx, record)
		switch {
		case err != nil:
			return err
		case at == next.id && asked && its == l:
			return nil // by a request whose answer was lost
		case at != its.id:
			return ErrChanged
		}
		asked = true
		keys = slices.DeleteFunc(keys, func(key string) bool { return key == record })
		if its == l {
			keys = append(keys, record) // last: the next agent goes by it
		}
		err = l.moveKeys(ctx, next, node, revision, keys, v, keep)
		if errors.Is(err, ErrChanged) {
			return fmt.Errorf("%v: listed again", err) // what was asked for before was done meanwhile, or a lock was let go
		}
		return err
	})
}

// impatient is after how long a read that something waits for is sent to another member of etcd, too.
const impatient = 100 * time.Millisecond

// recordAt returns the lease that an agent's record is under, and its revision; zeros: there is none.
func (c *Client) recordAt(ctx context.Context, record string) (lease clientv3.LeaseID, revision int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := retryElsewhere(ctx, c.elsewhere(impatient), func(ctx context.Context) (*clientv3.GetResponse, error) { return c.etcd.Get(ctx, record) })
	if err != nil {
		return 0, 0, fmt.Errorf("reading the agent's record: %w", err)
	}
	if len(resp.Kvs) == 0 {
		return 0, 0, nil
	}
	return clientv3.LeaseID(resp.Kvs[0].Lease), resp.Kvs[0].ModRevision, nil
}

// Holds returns those of the egress IPs whose locks are under the lease.
func (l *Lease) Holds(ctx context.Context, ips []netip.Addr) (held []netip.Addr, err error) {
	for batch := range slices.Chunk(ips, maxTxnOps/2) {
		var gets []clientv3.Op
		for _, ip := range batch {
			gets = append(gets, clientv3.OpGet(l.client.key(OwnerKey(ip))))
		}
		resp, err := l.client.read(ctx, gets)
		if err != nil {
			return nil, fmt.Errorf("reading the locks under lease %s: %w", egress.FormatLease(l.ID()), err)
		}
		for i, r := range resp.Responses {
			if kvs := r.GetResponseRange().Kvs; len(kvs) == 1 && kvs[0].Lease == l.ID() {
				held = append(held, batch[i])
			}
		}
	}
	return held, nil
}

// read is a transaction that only reads.
func (c *Client) read(ctx context.Context, gets []clientv3.Op) (*clientv3.TxnResponse, error) {
	return retryElsewhere(ctx, c.elsewhere(impatient), func(ctx context.Context) (*clientv3.TxnResponse, error) { return c.txn(ctx, nil, gets, nil) })
}

// moveKeys moves keys of the lease to another one: the node's record, which is as of revision, with the value v, locks
// for which keep is false to none. A process that adopts the lease gives the record another revision, so that what this
// one has sent moves nothing any more. errors.Is(err, ErrChanged): a key is not under the lease, or the record has
// changed.
func (l *Lease) moveKeys(ctx context.Context, next *Lease, node string, revision int64, keys []string, v []byte, keep func(netip.Addr) bool) error {
	record := l.client.key(AgentKey(node))
	for batch := range slices.Chunk(keys, maxTxnOps/2) {
		ifs := []clientv3.Cmp{unchanged(record, revision)}
		var then []clientv3.Op
		for _, key := range batch {
			ifs = append(ifs, clientv3.Compare(clientv3.LeaseValue(key), "=", l.id))
			switch ip, isLock := l.client.lockOf(key); {
			case key == record: // a suspicion is of the record as it was before
				then = append(then, clientv3.OpPut(record, string(v), clientv3.WithLease(next.id)), clientv3.OpDelete(l.client.key(SuspicionKey(node))))
			case isLock && !keep(ip):
				// As by ReleaseUnused: whether the owner before is silent was its word in this etcd, or in one that was
				// restored since.
				h, err := l.client.putTenure(egress.Tenure{IP: ip, Why: egress.ReasonRelease})
				if err != nil {
					return err
				}
				then = append(then, clientv3.OpDelete(key), h)
			default:
				then = append(then, clientv3.OpPut(key, "", clientv3.WithIgnoreValue(), clientv3.WithLease(next.id)))
			}
		}
		done, err := l.client.txn(ctx, ifs, then, nil)
		if err != nil {
			return err
		}
		if !done.Succeeded {
			return ErrChanged
		}
	}
	return nil
}

// condition is how a lease is doing.
type condition int

const (
	confirmed condition = iota
	unconfirmed
	expired // unconfirmed for as long as the lease is: etcd may have dropped it
)

// Keep says how Run keeps a lease, and who hears of it. Each may be nil.
type Keep struct {
	// Idle reports that nothing is lost with the lease but what can be written anew at once: it is renewed a third as
	// often then.
	Idle func() bool
	// Renewed is called on each renewal, with when the request was sent and for how long etcd keeps the lease from then
	// on.
	Renewed func(sent time.Time, ttl time.Duration)
	// Changed is called when renewals begin to fail, when the lease is no longer Valid, when renewals succeed again,
	// and when the lease is lost; not on each renewal.
	Changed func()
}

// idleRenewals is how many intervals of Run there are between two renewals of an idle lease.
const idleRenewals = 3

// Run renews the lease ten times per TTL, at most every 100 ms and at least every second, until ctx ends, whose error
// it then returns, or the lease is lost (ErrLeaseLost). It does not revoke the lease. While Keep.Idle says so it renews
// at every third of these times, until a renewal fails.
func (l *Lease) Run(ctx context.Context, keep Keep) error {
	ttl := l.TTL()
	interval := min(max(ttl/10, 100*time.Millisecond), time.Second)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	stream := &renewals{lease: l, after: elsewhereAfter}
	defer stream.close()
	skipped := 0
	for was := confirmed; ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if skipped++; skipped < idleRenewals && was == confirmed && !l.isLost() && keep.Idle != nil && keep.Idle() {
			continue
		}
		// A request that hangs leaves time for three more, or for two where the lease was idle.
		timeout := min((ttl-time.Duration(skipped-1)*interval)/4, 3*time.Second)
		skipped = 0
		try, cancel := context.WithTimeout(ctx, timeout)
		sent, err := l.renew(try, stream)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil && keep.Renewed != nil {
			keep.Renewed(sent, l.TTL())
		}
		is := l.condition(err)
		l.report(is, err)
		if is != was || errors.Is(err, ErrLeaseLost) {
			if was = is; keep.Changed != nil {
				keep.Changed()
			}
		}
		if errors.Is(err, ErrLeaseLost) {
			return err
		}
	}
}

func (l *Lease) condition(err error) condition {
	switch {
	case err == nil:
		return confirmed
	case time.Now().Before(l.Valid()):
		return unconfirmed
	}
	return expired
}

// report logs when the lease was not renewed for half of its length, and when it is again, unless a watch has logged
// that etcd is lost; that a lease is lost is the caller's to log.
func (l *Lease) report(is condition, err error) {
	switch {
	case is == confirmed:
		if l.warned {
			l.client.log.Info("lease renewed again", "lease", egress.FormatLease(l.ID()))
		}
		l.reported, l.warned = false, false
	case l.reported || errors.Is(err, ErrLeaseLost):
	case l.client.watchLost.Load():
		l.reported = true
	case time.Until(l.Valid()) < l.TTL()/2:
		l.reported, l.warned = true, true
		l.client.log.Warn("lease not renewed, will retry", "lease", egress.FormatLease(l.ID()), "err", err)
	}
}

// Revoke ends the lease and deletes every key under it. It is not Valid from the call on, whatever comes of it. No
// error: it is gone.
func (l *Lease) Revoke(ctx context.Context) error {
	l.lose() // before etcd hears of it
	return l.client.revoke(ctx, l.id)
}

// Revoke ends the lease of a dead agent, which deletes its keys. Nil when it is gone already.
func (c *Client) Revoke(ctx context.Context, id int64) error {
	return c.revoke(ctx, clientv3.LeaseID(id))
}

// Suspect writes a suspicion against the agent of a node. It requires that the agent's record is under the lease that s
// names, and unchanged since revision seen. false: it is not, or there is a suspicion already.
func (c *Client) Suspect(ctx context.Context, s egress.Suspicion, seen int64) (bool, error) {
	id, err := egress.ParseLease(s.Lease)
	if err != nil {
		return false, fmt.Errorf("suspecting %s: %w", s.Node, err)
	}
	v, err := Encode(s)
	if err != nil {
		return false, err
	}
	key, record := c.key(SuspicionKey(s.Node)), c.key(AgentKey(s.Node))
	resp, err := c.txn(ctx,
		[]clientv3.Cmp{absent(key), clientv3.Compare(clientv3.LeaseValue(record), "=", clientv3.LeaseID(id)), unchangedSince(record, seen)},
		[]clientv3.Op{clientv3.OpPut(key, string(v))}, nil)
	if err != nil {
		return false, fmt.Errorf("suspecting %s: %w", s.Node, err)
	}
	return resp.Succeeded, nil
}

// Suspected reports whether a suspicion, as it was at a revision, still stands.
func (c *Client) Suspected(ctx context.Context, s egress.Suspicion) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := c.etcd.Get(ctx, c.key(SuspicionKey(s.Node)), clientv3.WithKeysOnly())
	if err != nil {
		return false, fmt.Errorf("reading the suspicion against %s: %w", s.Node, err)
	}
	return len(resp.Kvs) == 1 && resp.Kvs[0].ModRevision == s.Revision, nil
}

func (c *Client) revoke(ctx context.Context, id clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	_, err := retryElsewhere(ctx, c.elsewhere(impatient), func(ctx context.Context) (*clientv3.LeaseRevokeResponse, error) { return c.etcd.Revoke(ctx, id) })
	if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return fmt.Errorf("revoking lease %s: %w", egress.FormatLease(int64(id)), err)
	}
	return nil
}

// known turns etcd's error that there is no such lease into ErrLeaseLost.
func (l *Lease) known(err error) error {
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		l.lose()
		return ErrLeaseLost
	}
	return err
}

func (l *Lease) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost, l.valid = true, time.Time{}
}

func (l *Lease) isLost() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lost
}

func (l *Lease) errLost() error {
	return fmt.Errorf("renewing lease %s: %w", egress.FormatLease(l.ID()), ErrLeaseLost)
}
