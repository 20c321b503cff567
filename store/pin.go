package store

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

// Pin makes a node the preferred one of an IP, in the place of an earlier pin.
func (c *Client) Pin(ctx context.Context, p egress.Pin) error {
	v, err := Encode(p)
	if err != nil {
		return err
	}
	act, undone, err := c.act(ctx, egress.Act{What: egress.ActPin, IP: p.IP, Node: p.Node})
	if err != nil {
		return err
	}
	if _, err := c.txn(ctx, nil, append(act, clientv3.OpPut(c.key(PinKey(p.IP)), string(v))), nil); err != nil {
		undone()
		return fmt.Errorf("writing %s: %w", PinKey(p.IP), err)
	}
	return nil
}

// Unpin drops the pin of an IP. false: there was none.
func (c *Client) Unpin(ctx context.Context, ip netip.Addr) (bool, error) {
	return c.drop(ctx, PinKey(ip), egress.Act{What: egress.ActUnpin, IP: ip})
}

// Cordon makes a node give its IPs away and take none. A cordon that is there already stays as it is.
func (c *Client) Cordon(ctx context.Context, r egress.Cordon) error {
	r.By = c.by
	v, err := Encode(r)
	if err != nil {
		return err
	}
	what := egress.ActCordon
	if r.Why == string(egress.ActDrain) {
		what = egress.ActDrain
	}
	act, undone, err := c.act(ctx, egress.Act{What: what, Node: r.Node})
	if err != nil {
		return err
	}
	key := c.key(CordonKey(r.Node))
	if _, err := c.txn(ctx, []clientv3.Cmp{absent(key)}, append(slices.Clone(act), clientv3.OpPut(key, string(v))), act); err != nil {
		undone()
		return fmt.Errorf("writing %s: %w", CordonKey(r.Node), err)
	}
	return nil
}

// Uncordon ends a cordon. false: there was none.
func (c *Client) Uncordon(ctx context.Context, node string) (bool, error) {
	return c.drop(ctx, CordonKey(node), egress.Act{What: egress.ActUncordon, Node: node})
}

// drop deletes a record, which is an act. false: there was none.
func (c *Client) drop(ctx context.Context, key string, a egress.Act) (bool, error) {
	act, undone, err := c.act(ctx, a)
	if err != nil {
		return false, err
	}
	there := clientv3.Compare(clientv3.CreateRevision(c.key(key)), ">", 0)
	resp, err := c.txn(ctx, []clientv3.Cmp{there}, append(act, clientv3.OpDelete(c.key(key))), nil)
	if err != nil || !resp.Succeeded {
		undone()
	}
	if err != nil {
		return false, fmt.Errorf("deleting %s: %w", key, err)
	}
	return resp.Succeeded, nil
}
