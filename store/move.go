package store

import (
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

// RequestMoves asks for planned moves, of all or none. The requests are under the lease that it returns: they go when
// the caller revokes it, as it has to in the end, or when it expires after patience, rounded up to whole seconds. When
// there is a request for an IP already, the error names its target.
func (c *Client) RequestMoves(ctx context.Context, patience time.Duration, moves ...egress.Move) (*Lease, error) {
	values := make([][]byte, len(moves))
	var undo []func()
	for i, m := range moves {
		var err error
		m.By = c.by
		if values[i], err = Encode(m); err != nil {
			return nil, err
		}
	}
	l, err := c.Grant(ctx, patience)
	if err != nil {
		return nil, fmt.Errorf("requesting a move: %w", err)
	}
	var none []clientv3.Cmp
	var puts, gets []clientv3.Op
	for i, m := range moves {
		act, undone, err := c.act(ctx, egress.Act{What: egress.ActMove, IP: m.IP, Node: m.To})
		if err != nil {
			_ = l.Revoke(ctx) // it ends by itself
			return nil, err
		}
		undo = append(undo, undone)
		puts = append(puts, act...)
		key := c.key(MoveKey(m.IP))
		none = append(none, absent(key))
		puts = append(puts, clientv3.OpPut(key, string(values[i]), clientv3.WithLease(l.id)))
		gets = append(gets, clientv3.OpGet(key))
	}
	resp, err := c.txn(ctx, none, puts, gets)
	if err == nil && resp.Succeeded {
		return l, nil
	}
	if err == nil {
		for i, r := range resp.Responses {
			for _, kv := range r.GetResponseRange().Kvs {
				to := "a node that cannot be read"
				if other, err := Decode[egress.Move](recordOf(kv)); err == nil {
					to = other.To
				}
				err = fmt.Errorf("a move of %s to %s is under way", moves[i].IP, to)
			}
		}
	}
	// Also when it is not known whether the requests were written: no move may follow this error.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	_ = l.Revoke(end) // it ends by itself
	for _, undone := range undo {
		undone()
	}
	return nil, fmt.Errorf("requesting a move: %w", err)
}

// AskMove asks for a planned move of an IP by its owner, under the owner's own lease. false: the IP is not the owner's
// any more, or a move of it is under way.
func (c *Client) AskMove(ctx context.Context, l *Lease, o egress.Owner, m egress.Move) (bool, error) {
	v, err := Encode(m)
	if err != nil {
		return false, err
	}
	key := c.key(MoveKey(m.IP))
	resp, err := c.txn(ctx,
		[]clientv3.Cmp{absent(key), unchanged(c.key(OwnerKey(o.IP)), o.Revision)},
		[]clientv3.Op{clientv3.OpPut(key, string(v), clientv3.WithLease(l.id))}, nil)
	if err != nil {
		return false, fmt.Errorf("asking for a move of %s: %w", m.IP, l.known(err))
	}
	return resp.Succeeded, nil
}

// WithdrawMove takes a request back. false: it is not the one of m.Revision any more.
func (c *Client) WithdrawMove(ctx context.Context, m egress.Move) (bool, error) {
	key := c.key(MoveKey(m.IP))
	resp, err := c.txn(ctx, []clientv3.Cmp{unchanged(key, m.Revision)}, []clientv3.Op{clientv3.OpDelete(key)}, nil)
	if err != nil {
		return false, fmt.Errorf("withdrawing the move of %s: %w", m.IP, err)
	}
	return resp.Succeeded, nil
}

// Ready notes that the target of a move, whose agent has the lease l, is ready for the IP. The record keeps its own
// lease. false: it is not the one of m.Revision any more.
func (c *Client) Ready(ctx context.Context, m egress.Move, l *Lease) (bool, error) {
	if m.Revision == 0 {
		return false, fmt.Errorf("getting ready for %s: the record of the move has no revision", m.IP)
	}
	revision := m.Revision
	m.Ready, m.ReadyLease = true, egress.FormatLease(l.ID())
	v, err := Encode(m)
	if err != nil {
		return false, err
	}
	key := c.key(MoveKey(m.IP))
	// Once more at another member does no harm: the second finds the record changed.
	resp, err := retryElsewhere(ctx, c.elsewhere(200*time.Millisecond), func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return c.txn(ctx,
			[]clientv3.Cmp{unchanged(key, revision)},
			[]clientv3.Op{clientv3.OpPut(key, string(v), clientv3.WithIgnoreLease())}, nil)
	})
	if err != nil {
		return false, fmt.Errorf("getting ready for %s: %w", m.IP, err)
	}
	return resp.Succeeded, nil
}
