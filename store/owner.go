package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/egret-project/egret/egress"
)

// Agent returns the record of a node's agent, the zero Agent when there is none. One that cannot be read is logged and
// counts as none: the next agent of the node writes it anew.
func (c *Client) Agent(ctx context.Context, node string) (egress.Agent, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := c.etcd.Get(ctx, c.key(AgentKey(node)))
	if err != nil {
		return egress.Agent{}, fmt.Errorf("reading %s: %w", AgentKey(node), err)
	}
	if len(resp.Kvs) == 0 {
		return egress.Agent{}, nil
	}
	a, err := Decode[egress.Agent](recordOf(resp.Kvs[0]))
	if err == nil {
		err = checkAgent(node, a)
	}
	if err != nil {
		c.log.Warn("record of the agent cannot be read, and counts as none", "node", node, "err", err)
		return egress.Agent{}, nil
	}
	return a, nil
}

// Owner returns the record of the lock of an egress IP, the zero Owner when there is none, or one that cannot be read.
func (c *Client) Owner(ctx context.Context, ip netip.Addr) (egress.Owner, error) {
	resp, err := c.read(ctx, []clientv3.Op{clientv3.OpGet(c.key(OwnerKey(ip)))})
	if err != nil {
		return egress.Owner{}, fmt.Errorf("reading %s: %w", OwnerKey(ip), err)
	}
	for _, kv := range resp.Responses[0].GetResponseRange().Kvs {
		if o, err := DecodeOwner(recordOf(kv)); err == nil {
			return o, nil
		}
	}
	return egress.Owner{}, nil
}

// PutAgent writes agents/<node> under the lease, which it enters in the record, if the record is as it was at revision
// seen. It is no error when the record is there already. errors.Is(err, ErrChanged): the record changed since, as
// when the agent's next process has taken over what was under its lease. errors.Is(err, ErrLeaseLost): the lease is gone.
func (c *Client) PutAgent(ctx context.Context, l *Lease, a egress.Agent, seen int64) error {
	a.Lease = egress.FormatLease(l.ID())
	v, err := Encode(a)
	if err != nil {
		return err
	}
	key := c.key(AgentKey(a.Node))
	put, err := c.txn(ctx,
		[]clientv3.Cmp{unchangedSince(key, seen)},
		[]clientv3.Op{clientv3.OpPut(key, string(v), clientv3.WithLease(l.id))}, []clientv3.Op{clientv3.OpGet(key)})
	if err == nil && !put.Succeeded {
		have := put.Responses[0].GetResponseRange().Kvs
		if len(have) == 0 || clientv3.LeaseID(have[0].Lease) != l.id || !bytes.Equal(have[0].Value, v) {
			err = ErrChanged
		}
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", AgentKey(a.Node), l.known(err))
	}
	return nil
}

// Former is the last lock of an egress IP that an agent saw. The zero Former is none.
type Former struct {
	Revision int64
	// Suspicion is the one that stands against the lock's owner, with the lease that the lock was under; zero: none.
	Suspicion egress.Suspicion
}

// Claim takes the lock of an egress IP for the lease. It is true as well when the lock is the lease's already, as after
// a claim whose answer was lost. false: another agent has or just had the lock, or the node is cordoned (which does not
// matter for a static IP). errors.Is(err, ErrLeaseLost): the lease is gone.
//
// former is the last lock that the caller saw. If an owner gave the IP up after it, and the lock did not change since,
// the record has that owner in From. Else, if the suspicion against former's owner still stands, and nobody had a lock
// of the IP in between, the record has the suspicion's revision.
func (c *Client) Claim(ctx context.Context, l *Lease, o egress.Owner, former Former) (bool, error) {
	_, ok, err := c.claim(ctx, l, o, former)
	return ok, err
}

// claim is Claim; from is the From of the record.
func (c *Client) claim(ctx context.Context, l *Lease, o egress.Owner, former Former) (from string, ok bool, err error) {
	var last *mvccpb.KeyValue
	if former.Revision > 0 {
		// Else the claimer waits, as for an owner that is dead.
		if resp, err := c.history(ctx, o.IP, 1); err == nil && len(resp.Kvs) > 0 {
			last = resp.Kvs[0]
		}
	}
	take, err := c.takingOf(l, o, former, last)
	if err != nil {
		return "", false, err
	}
	ifs := take.ifs
	if o.Why != egress.ReasonStatic {
		ifs = append(ifs, absent(c.key(CordonKey(o.Node))))
	}
	resp, err := c.txn(ctx, ifs, take.then, []clientv3.Op{clientv3.OpGet(c.key(OwnerKey(o.IP)))})
	if err != nil {
		return "", false, fmt.Errorf("claiming %s: %w", o.IP, l.known(err))
	}
	if resp.Succeeded {
		return take.from, true, nil
	}
	kvs := resp.Responses[0].GetResponseRange().Kvs
	if len(kvs) == 0 && take.suspected {
		former.Suspicion = egress.Suspicion{}
		return c.claim(ctx, l, o, former) // it does not stand any more, or there was another owner
	}
	return take.from, len(kvs) == 1 && kvs[0].Lease == l.ID(), nil
}

// Want is a lock that a node wants, and the last one of it that the node saw.
type Want struct {
	Owner  egress.Owner // ClaimAll sets its From to that of the record
	Former Former
}

const (
	// claimBatch is how many locks one transaction takes: each has up to four comparisons.
	claimBatch = (maxTxnOps - 1) / 4
	// claimsAtOnce is how many transactions are under way: etcd writes together what comes together.
	claimsAtOnce = 32
)

// ClaimAll takes locks for the lease as Claim does each of them, all of one node, and returns for which it is true.
// Many are taken in one transaction: a gateway that dies leaves hundreds, and each transaction is an event of its own
// for all who watch the owners. Where something speaks against one of those, each is tried alone. The error is that of
// all that could not be tried.
func (c *Client) ClaimAll(ctx context.Context, l *Lease, list []Want) ([]bool, error) {
	ok, errs := make([]bool, len(list)), make([]error, len(list))
	inParallel := func(step int, do func(from, to int)) {
		var all errgroup.Group
		all.SetLimit(claimsAtOnce)
		for from := 0; from < len(list); from += step {
			all.Go(func() error { do(from, min(from+step, len(list))); return nil })
		}
		_ = all.Wait() // errs has them all
	}
	inParallel(claimBatch, func(from, to int) {
		for i, done := from, to > from+1 && c.claimBatch(ctx, l, list[from:to]); i < to; i++ {
			ok[i] = done
		}
	})
	inParallel(1, func(i, _ int) {
		if !ok[i] {
			list[i].Owner.From, ok[i], errs[i] = c.claim(ctx, l, list[i].Owner, list[i].Former)
		}
	})
	return ok, errors.Join(errs...)
}

// claimBatch takes all the locks in one transaction. false: it took none, or that is not known.
func (c *Client) claimBatch(ctx context.Context, l *Lease, list []Want) bool {
	var gets []clientv3.Op
	for _, w := range list {
		if w.Former.Revision > 0 {
			gets = append(gets, clientv3.OpGet(c.key(HistoryPrefix+w.Owner.IP.String()+"/"), newest(1)...))
		}
	}
	var read []*pb.ResponseOp
	if len(gets) > 0 {
		resp, err := c.txn(ctx, nil, gets, nil)
		if err != nil {
			return false
		}
		read = resp.Responses
	}
	// Static IPs do not go by it: on a cordoned node each is tried alone.
	ifs := []clientv3.Cmp{absent(c.key(CordonKey(list[0].Owner.Node)))}
	var then []clientv3.Op
	for i, w := range list {
		var last *mvccpb.KeyValue
		if w.Former.Revision > 0 {
			if kvs := read[0].GetResponseRange().Kvs; len(kvs) > 0 {
				last = kvs[0]
			}
			read = read[1:]
		}
		take, err := c.takingOf(l, w.Owner, w.Former, last)
		if err != nil {
			return false
		}
		ifs, then = append(ifs, take.ifs...), append(then, take.then...)
		list[i].Owner.From = take.from
	}
	resp, err := c.txn(ctx, ifs, then, nil)
	return err == nil && resp.Succeeded
}

// taking is what takes a lock, but that the node is not cordoned, so that nothing comes to one that was seen to be
// empty after its cordon.
type taking struct {
	ifs       []clientv3.Cmp
	then      []clientv3.Op
	from      string // egress.Owner.From of the record
	suspected bool   // the record names the suspicion
}

// takingOf returns what takes the lock of an egress IP; last is the newest record of its history, nil where that is
// not known, or there is none.
func (c *Client) takingOf(l *Lease, o egress.Owner, former Former, last *mvccpb.KeyValue) (taking, error) {
	var out taking
	if o.From, o.Suspicion = "", 0; former.Revision > 0 {
		o.From, out.ifs = c.released(last, o.IP, former.Revision)
		if s := former.Suspicion; o.From == "" && s.Revision > 0 {
			o.Suspicion, out.suspected = s.Revision, true
			none := clientv3.Compare(clientv3.CreateRevision(c.key(HistoryPrefix+o.IP.String()+"/")), "<", former.Revision+1)
			// Else its history is a new one.
			same := clientv3.Compare(clientv3.CreateRevision(c.key(AllocationKey(o.IP))), "<", former.Revision+1)
			out.ifs = append(out.ifs, unchanged(c.key(SuspicionKey(s.Node)), s.Revision), none.WithPrefix(), same)
		}
	}
	out.from = o.From
	v, err := Encode(o)
	if err != nil {
		return out, err
	}
	h, err := c.putTenure(egress.Tenure{IP: o.IP, Node: o.Node, Why: o.Why})
	if err != nil {
		return out, err
	}
	key := c.key(OwnerKey(o.IP))
	out.ifs = append(out.ifs, absent(key))
	out.then = []clientv3.Op{clientv3.OpPut(key, string(v), clientv3.WithLease(l.id)), h}
	return out, nil
}

// released returns the node that gave the IP up after the lock of revision seen, if the lock did not change otherwise
// since, and conditions that fail once it does. It compares revisions, since the history of an etcd that was restored
// lacks later owners. last is the newest record of the history, or nil.
func (c *Client) released(last *mvccpb.KeyValue, ip netip.Addr, seen int64) (from string, still []clientv3.Cmp) {
	if last == nil {
		return "", nil
	}
	t, err := Decode[egress.Tenure](recordOf(last))
	if err != nil || t.Node != "" || t.Why != egress.ReasonRelease || last.CreateRevision <= seen {
		return "", nil
	}
	since := clientv3.Compare(clientv3.CreateRevision(c.key(HistoryPrefix+ip.String()+"/")), "<", last.CreateRevision+1)
	return t.From, []clientv3.Cmp{since.WithPrefix()}
}

// Release gives up the lock of an egress IP for which the node has stopped answering. false: the lock is not the one of
// o.Revision any more, and stays.
func (c *Client) Release(ctx context.Context, o egress.Owner) (bool, error) {
	return c.release(ctx, o, o.Node)
}

// ReleaseUnused is Release for a node that has not used the IP since it got the lock. It may not have waited until the
// permit of the owner before it ended, so the next owner has to wait.
func (c *Client) ReleaseUnused(ctx context.Context, o egress.Owner) (bool, error) {
	return c.release(ctx, o, "")
}

// release gives up a lock; from is the node that is known to have stopped answering, empty when that is not known.
func (c *Client) release(ctx context.Context, o egress.Owner, from string) (bool, error) {
	if o.Revision == 0 {
		return false, fmt.Errorf("releasing %s: the record has no revision", o.IP)
	}
	h, err := c.putTenure(egress.Tenure{IP: o.IP, Why: egress.ReasonRelease, From: from})
	if err != nil {
		return false, err
	}
	key := c.key(OwnerKey(o.IP))
	resp, err := c.txn(ctx, []clientv3.Cmp{unchanged(key, o.Revision)}, []clientv3.Op{clientv3.OpDelete(key), h}, nil)
	if err != nil {
		return false, fmt.Errorf("releasing %s: %w", o.IP, err)
	}
	return resp.Succeeded, nil
}

// HandOver makes the agent to the owner of o.IP, under its lease, and deletes the move. The caller has stopped
// answering for the IP before. false, and nothing changes: o or m has another revision now, the agent's record is not
// under the lease that it names (an agent that restarts moves it to another), or its node is cordoned.
func (c *Client) HandOver(ctx context.Context, o egress.Owner, m egress.Move, to egress.Agent) (bool, error) {
	fail := func(err error) (bool, error) {
		return false, fmt.Errorf("handing %s over to %s: %w", o.IP, to.Node, err)
	}
	if o.IP != m.IP || m.To != to.Node || o.Revision == 0 || m.Revision == 0 {
		return fail(fmt.Errorf("want owner and move of one IP, with revisions, and the agent that the move names, got %s, %s to %s", o.IP, m.IP, m.To))
	}
	id, err := egress.ParseLease(to.Lease)
	if err != nil {
		return fail(err)
	}
	why := cmp.Or(m.Why, egress.ReasonMove)
	v, err := Encode(egress.Owner{IP: o.IP, Node: to.Node, Since: time.Now().UTC().Truncate(time.Millisecond), Why: why, From: o.Node})
	if err != nil {
		return fail(err)
	}
	h, err := c.putTenure(egress.Tenure{IP: o.IP, Node: to.Node, Why: why, From: o.Node, By: m.By})
	if err != nil {
		return fail(err)
	}
	owner, move, lease := c.key(OwnerKey(o.IP)), c.key(MoveKey(m.IP)), clientv3.LeaseID(id)
	resp, err := c.txn(ctx,
		[]clientv3.Cmp{
			unchanged(owner, o.Revision), unchanged(move, m.Revision),
			absent(c.key(CordonKey(to.Node))),
			// of an absent key it is 0, which ParseLease refuses
			clientv3.Compare(clientv3.LeaseValue(c.key(AgentKey(to.Node))), "=", lease),
		},
		[]clientv3.Op{clientv3.OpPut(owner, string(v), clientv3.WithLease(lease)), clientv3.OpDelete(move), h}, nil)
	if err != nil {
		return fail(err)
	}
	return resp.Succeeded, nil
}

func absent(key string) clientv3.Cmp { return clientv3.Compare(clientv3.CreateRevision(key), "=", 0) }

func unchanged(key string, revision int64) clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(key), "=", revision)
}

// unchangedSince holds as well where there is no such key.
func unchangedSince(key string, revision int64) clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(key), "<", revision+1)
}

// RaisePermit makes p the longest permit that an agent may have. The caller read a shorter one at revision seen. false:
// that has changed since.
func (c *Client) RaisePermit(ctx context.Context, p time.Duration, seen int64) (bool, error) {
	return c.putPermit(ctx, p, seen)
}

// LowerPermit makes p the longest permit that an agent may have. The caller read a longer one at revision seen, and for
// long enough no agent that uses it. false: that, or the record of some agent, has changed since.
func (c *Client) LowerPermit(ctx context.Context, p time.Duration, seen int64) (bool, error) {
	return c.putPermit(ctx, p, seen, unchangedSince(c.key(AgentPrefix), seen).WithPrefix())
}

func (c *Client) putPermit(ctx context.Context, p time.Duration, seen int64, ifs ...clientv3.Cmp) (bool, error) {
	v, err := Encode(egress.Permits{Longest: egress.Duration(p)})
	if err != nil {
		return false, err
	}
	key := c.key(PermitKey)
	resp, err := c.txn(ctx, append(ifs, unchangedSince(key, seen)), []clientv3.Op{clientv3.OpPut(key, string(v))}, nil)
	if err != nil {
		return false, fmt.Errorf("writing %s: %w", PermitKey, err)
	}
	return resp.Succeeded, nil
}
