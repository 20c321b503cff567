package store

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

// Agent returns the record of a node's agent, the zero Agent when there is none. One that cannot be read is logged and counts as none:
// the next agent of the node writes it anew.
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

// PutAgent writes agents/<node> under the lease, which it enters in the record. It writes nothing when the record is there already.
// errors.Is(err, ErrLeaseLost): the lease is gone.
func (c *Client) PutAgent(ctx context.Context, l *Lease, a egress.Agent) error {
	a.Lease = egress.FormatLease(l.ID())
	v, err := Encode(a)
	if err != nil {
		return err
	}
	key := c.key(AgentKey(a.Node))
	_, err = c.txn(ctx,
		[]clientv3.Cmp{clientv3.Compare(clientv3.Value(key), "=", string(v)), clientv3.Compare(clientv3.LeaseValue(key), "=", l.id)},
		nil, []clientv3.Op{clientv3.OpPut(key, string(v), clientv3.WithLease(l.id))})
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

// Claim takes the lock of an egress IP for the lease. false: somebody else has it, or had it a moment ago, or the operator has cordoned the
// node, which may have what is static all the same. It is true as well when the lock is the lease's already, as after a claim whose answer
// was lost. The record says From whom the IP comes if somebody gave it up after the former lock, and nothing happened to the lock since; and it has the
// former lock's suspicion, if that still stands, and nobody had a lock of the IP in between. errors.Is(err, ErrLeaseLost): the lease is gone.
func (c *Client) Claim(ctx context.Context, l *Lease, o egress.Owner, former Former) (bool, error) {
	var still []clientv3.Cmp
	if o.From, o.Suspicion = "", 0; former.Revision > 0 {
		o.From, still = c.released(ctx, o.IP, former.Revision)
		if s := former.Suspicion; o.From == "" && s.Revision > 0 {
			o.Suspicion = s.Revision
			last := clientv3.Compare(clientv3.CreateRevision(c.key(HistoryPrefix+o.IP.String()+"/")), "<", former.Revision+1)
			same := clientv3.Compare(clientv3.CreateRevision(c.key(AllocationKey(o.IP))), "<", former.Revision+1) // else its history is a new one
			still = append(still, unchanged(c.key(SuspicionKey(s.Node)), s.Revision), last.WithPrefix(), same)
		}
	}
	v, err := Encode(o)
	if err != nil {
		return false, err
	}
	h, err := c.putTenure(egress.Tenure{IP: o.IP, Node: o.Node, Why: o.Why})
	if err != nil {
		return false, err
	}
	key := c.key(OwnerKey(o.IP))
	if o.Why != egress.ReasonStatic { // so that nothing comes to a node that was seen to be empty after its cordon
		still = append(still, absent(c.key(CordonKey(o.Node))))
	}
	resp, err := c.txn(ctx,
		append(still, absent(key)),
		[]clientv3.Op{clientv3.OpPut(key, string(v), clientv3.WithLease(l.id)), h},
		[]clientv3.Op{clientv3.OpGet(key)})
	if err != nil {
		return false, fmt.Errorf("claiming %s: %w", o.IP, l.known(err))
	}
	if resp.Succeeded {
		return true, nil
	}
	kvs := resp.Responses[0].GetResponseRange().Kvs
	if len(kvs) == 0 && o.Suspicion > 0 {
		former.Suspicion = egress.Suspicion{}
		return c.Claim(ctx, l, o, former) // it does not stand any more, or there was another owner
	}
	return len(kvs) == 1 && kvs[0].Lease == l.ID(), nil
}

// released returns who gave the IP up after the lock of revision seen, if nothing else happened to its lock since, and what holds as long as that
// is so. By history alone it would not do: that of an etcd which was restored says nothing of an owner that came later.
func (c *Client) released(ctx context.Context, ip netip.Addr, seen int64) (from string, still []clientv3.Cmp) {
	resp, err := c.history(ctx, ip, 1)
	if err != nil || len(resp.Kvs) == 0 {
		return "", nil // the claimer waits, as for an owner that is dead
	}
	last := resp.Kvs[0]
	t, err := Decode[egress.Tenure](recordOf(last))
	if err != nil || t.Node != "" || t.Why != egress.ReasonRelease || last.CreateRevision <= seen {
		return "", nil
	}
	since := clientv3.Compare(clientv3.CreateRevision(c.key(HistoryPrefix+ip.String()+"/")), "<", last.CreateRevision+1)
	return t.From, []clientv3.Cmp{since.WithPrefix()}
}

// Release gives up the lock of an egress IP, of which the node is silent. false: it is not the one of o.Revision any more, and stays.
func (c *Client) Release(ctx context.Context, o egress.Owner) (bool, error) {
	return c.release(ctx, o, o.Node)
}

// ReleaseUnused is Release for a node that has not used the IP since it got the lock, and may not have waited for the owner before it to fall
// silent: whoever is next has to.
func (c *Client) ReleaseUnused(ctx context.Context, o egress.Owner) (bool, error) {
	return c.release(ctx, o, "")
}

// release gives up a lock; from is who is known to be silent, and empty when nobody is.
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

// HandOver makes the agent to the owner of o.IP, under its lease, and ends the move. false, and nothing changes: o or m is not of
// this revision any more, the agent is not alive under the lease that its record names (one that restarts is under another), or its node is
// cordoned by now. The caller has stopped answering for the IP before.
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
			clientv3.Compare(clientv3.LeaseValue(c.key(AgentKey(to.Node))), "=", lease), // of an absent key it is 0, which ParseLease refuses
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

// RaisePermit makes p the longest permit that an agent may have, of who saw in etcd, at that revision, that it is a shorter one. false: that has
// changed since.
func (c *Client) RaisePermit(ctx context.Context, p time.Duration, seen int64) (bool, error) {
	return c.putPermit(ctx, p, seen)
}

// LowerPermit is RaisePermit for who saw that no agent has a permit as long as etcd says, for long enough: nor does any now.
func (c *Client) LowerPermit(ctx context.Context, p time.Duration, seen int64) (bool, error) {
	return c.putPermit(ctx, p, seen, clientv3.Compare(clientv3.ModRevision(c.key(AgentPrefix)), "<", seen+1).WithPrefix())
}

func (c *Client) putPermit(ctx context.Context, p time.Duration, seen int64, ifs ...clientv3.Cmp) (bool, error) {
	v, err := Encode(egress.Permits{Longest: egress.Duration(p)})
	if err != nil {
		return false, err
	}
	key := c.key(PermitKey)
	resp, err := c.txn(ctx, append(ifs, clientv3.Compare(clientv3.ModRevision(key), "<", seen+1)), []clientv3.Op{clientv3.OpPut(key, string(v))}, nil)
	if err != nil {
		return false, fmt.Errorf("writing %s: %w", PermitKey, err)
	}
	return resp.Succeeded, nil
}
