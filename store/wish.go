package store

import (
	"context"
	"fmt"
	"net/netip"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

// Pin makes a node the preferred one of an IP, in the place of an earlier pin.
func (c *Client) Pin(ctx context.Context, p egress.Pin) error {
	return c.put(ctx, PinKey(p.IP), p)
}

// Unpin drops the pin of an IP. false: there was none.
func (c *Client) Unpin(ctx context.Context, ip netip.Addr) (bool, error) {
	return c.drop(ctx, PinKey(ip))
}

// Cordon makes a node give its IPs away and take none. A cordon that is there already stays as it is.
func (c *Client) Cordon(ctx context.Context, r egress.Cordon) error {
	v, err := Encode(r)
	if err != nil {
		return err
	}
	key := c.key(CordonKey(r.Node))
	if _, err := c.txn(ctx, []clientv3.Cmp{absent(key)}, []clientv3.Op{clientv3.OpPut(key, string(v))}, nil); err != nil {
		return fmt.Errorf("writing %s: %w", CordonKey(r.Node), err)
	}
	return nil
}

// Uncordon ends a cordon. false: there was none.
func (c *Client) Uncordon(ctx context.Context, node string) (bool, error) {
	return c.drop(ctx, CordonKey(node))
}

func (c *Client) put(ctx context.Context, key string, record any) error {
	v, err := Encode(record)
	if err != nil {
		return err
	}
	if _, err := c.txn(ctx, nil, []clientv3.Op{clientv3.OpPut(c.key(key), string(v))}, nil); err != nil {
		return fmt.Errorf("writing %s: %w", key, err)
	}
	return nil
}

func (c *Client) drop(ctx context.Context, key string) (bool, error) {
	resp, err := c.txn(ctx, nil, []clientv3.Op{clientv3.OpDelete(c.key(key))}, nil)
	if err != nil {
		return false, fmt.Errorf("deleting %s: %w", key, err)
	}
	return resp.Responses[0].GetResponseDeleteRange().Deleted > 0, nil
}
