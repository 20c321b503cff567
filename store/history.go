package store

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

// maxHistory is how many tenures of an IP are kept: the moves of some weeks, in some kilobytes.
const maxHistory = 32

// putTenure returns the write of a tenure that begins now, for the transaction that changes the owner: it costs no
// round trip of its own.
func (c *Client) putTenure(t egress.Tenure) (clientv3.Op, error) {
	t.Since = time.Now().UTC()
	key := c.key(HistoryKey(t))
	t.Since = t.Since.Truncate(time.Millisecond)
	v, err := Encode(t)
	return clientv3.OpPut(key, string(v)), err
}

// History returns the last tenures of an IP, the oldest first, and an error for those that cannot be read.
func (c *Client) History(ctx context.Context, ip netip.Addr) ([]egress.Tenure, error) {
	kvs, err := c.history(ctx, ip, maxHistory)
	if err != nil {
		return nil, err
	}
	out, faulty := make([]egress.Tenure, 0, len(kvs.Kvs)), error(nil)
	for i := len(kvs.Kvs) - 1; i >= 0; i-- {
		t, err := Decode[egress.Tenure](recordOf(kvs.Kvs[i]))
		if err == nil {
			err = same("ip", t.IP, ip)
		}
		if err != nil {
			faulty = fmt.Errorf("record %s could not be read: %w", kvs.Kvs[i].Key, err)
			continue
		}
		out = append(out, t)
	}
	return out, faulty
}

// Unused reports whether an IP is allocated and had no owner since, not even one that gave it back: by the order in
// which etcd took the keys, whatever the clocks say.
func (c *Client) Unused(ctx context.Context, ip netip.Addr) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := c.etcd.Txn(ctx).Then(
		clientv3.OpGet(c.key(AllocationKey(ip)), clientv3.WithKeysOnly()),
		clientv3.OpGet(c.key(HistoryPrefix+ip.String()+"/"), append(clientv3.WithLastCreate(), clientv3.WithKeysOnly())...),
	).Commit()
	if err != nil {
		return false, fmt.Errorf("looking for former owners of %s: %w", ip, err)
	}
	allocated, last := resp.Responses[0].GetResponseRange().Kvs, resp.Responses[1].GetResponseRange().Kvs
	return len(allocated) > 0 && (len(last) == 0 || last[0].CreateRevision < allocated[0].CreateRevision), nil
}

// TrimHistory deletes all but the last tenures of an IP. Without any to delete it writes nothing.
func (c *Client) TrimHistory(ctx context.Context, ip netip.Addr) error {
	kvs, err := c.history(ctx, ip, maxHistory+maxTxnOps, clientv3.WithKeysOnly())
	if err != nil || len(kvs.Kvs) <= maxHistory {
		return err
	}
	var ops []clientv3.Op
	for _, kv := range kvs.Kvs[maxHistory:] {
		ops = append(ops, clientv3.OpDelete(string(kv.Key)))
	}
	if _, err := c.txn(ctx, nil, ops, nil); err != nil {
		return fmt.Errorf("trimming the history of %s: %w", ip, err)
	}
	return nil
}

// history reads the records of an IP's history, the newest first.
func (c *Client) history(ctx context.Context, ip netip.Addr, limit int64, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	resp, err := c.etcd.Get(ctx, c.key(HistoryPrefix+ip.String()+"/"), append(opts, newest(limit)...)...)
	if err != nil {
		return nil, fmt.Errorf("reading the history of %s: %w", ip, err)
	}
	return resp, nil
}

// newest are the options for the newest records below a prefix, the newest first.
func newest(limit int64) []clientv3.OpOption {
	return []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend), clientv3.WithLimit(limit)}
}
