package store

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Record is one key's value as etcd has it.
type Record struct {
	Value    []byte // not to be changed
	Revision int64  // the key's mod revision: the fencing token
	Lease    int64  // 0: none
}

func (r Record) equal(o Record) bool {
	return r.Revision == o.Revision && r.Lease == o.Lease && bytes.Equal(r.Value, o.Value)
}

func recordOf(kv *mvccpb.KeyValue) Record {
	return Record{Value: kv.Value, Revision: kv.ModRevision, Lease: kv.Lease}
}

// List returns the records below a prefix, by their keys, as etcd has them now. A prefix that does not end with a slash
// is one key.
func (c *Client) List(ctx context.Context, prefix string) (map[string]Record, error) {
	l, err := c.list(ctx, []string{prefix}, 0)
	return l.records, err
}

// list is what some prefixes held, by key, at one revision of the etcd that was the last after so many restores.
type list struct {
	records  map[string]Record
	revision int64
	restores int
}

// list lists the records below the prefixes at a revision; 0 asks for the present one. It is one Txn, or several of the
// same revision when there are more prefixes than a Txn takes.
func (c *Client) list(ctx context.Context, prefixes []string, revision int64) (list, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	asked := c.heads.ask()
	out := list{records: map[string]Record{}, revision: revision, restores: asked.restores}
	for chunk := range slices.Chunk(prefixes, maxTxnOps) {
		ops := make([]clientv3.Op, len(chunk))
		for i, p := range chunk {
			ops[i] = clientv3.OpGet(c.key(p), append(extent(p), clientv3.WithRev(out.revision))...)
		}
		resp, err := retryElsewhere(ctx, c.elsewhere(time.Second), func(ctx context.Context) (*clientv3.TxnResponse, error) { return c.etcd.Txn(ctx).Then(ops...).Commit() })
		if err != nil {
			return out, fmt.Errorf("listing %s: %w", strings.Join(chunk, ", "), err)
		}
		restores, err := c.heads.answered(asked, resp.Header)
		if err != nil && (out.revision != 0 || restores == asked.restores) { // else it is what shows it
			return out, fmt.Errorf("listing %s: %w", strings.Join(chunk, ", "), err)
		}
		if out.revision == 0 {
			out.revision, out.restores = resp.Header.Revision, restores
			asked = c.heads.ask()
		}
		for _, r := range resp.Responses {
			for _, kv := range r.GetResponseRange().Kvs {
				out.records[strings.TrimPrefix(string(kv.Key), c.prefix)] = recordOf(kv)
			}
		}
	}
	return out, nil
}

// EachKey calls f with the keys below a prefix, in order and page by page, until it returns an error. What changes
// meanwhile may be seen or not.
func (c *Client) EachKey(ctx context.Context, prefix string, page int64, f func(key string) error) error {
	for from, end := c.key(prefix), clientv3.GetPrefixRangeEnd(c.key(prefix)); ; {
		try, cancel := context.WithTimeout(ctx, requestTimeout)
		resp, err := c.etcd.Get(try, from, clientv3.WithRange(end), clientv3.WithLimit(page), clientv3.WithKeysOnly())
		cancel()
		if err != nil {
			return fmt.Errorf("listing the keys below %s: %w", prefix, err)
		}
		for _, kv := range resp.Kvs {
			if err := f(strings.TrimPrefix(string(kv.Key), c.prefix)); err != nil {
				return err
			}
			from = string(kv.Key) + "\x00"
		}
		if !resp.More {
			return nil
		}
	}
}

// single reports whether a range is one key: all others end with a slash, or are everything.
func single(prefix string) bool { return prefix != "" && !strings.HasSuffix(prefix, "/") }

// extent returns the option by which a request is about a range.
func extent(prefix string) []clientv3.OpOption {
	if single(prefix) {
		return nil
	}
	return []clientv3.OpOption{clientv3.WithPrefix()}
}

// covers reports whether a range has a key, or all of another range.
func covers(prefix, key string) bool {
	return prefix == key || !single(prefix) && strings.HasPrefix(key, prefix)
}

// disjoint returns the prefixes sorted, without those that another one covers.
func disjoint(prefixes []string) []string {
	var out []string
	for _, p := range slices.Sorted(slices.Values(prefixes)) {
		if n := len(out); n == 0 || !covers(out[n-1], p) {
			out = append(out, p)
		}
	}
	return out
}

// covered reports whether one of the disjoint, sorted prefixes covers key.
func covered(prefixes []string, key string) bool {
	i, found := slices.BinarySearch(prefixes, key)
	return found || i > 0 && covers(prefixes[i-1], key)
}
