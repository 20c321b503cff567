package bundle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// kind is a kind of records: below a prefix, or, where one is set, under one key.
type kind struct {
	file, prefix string
	one          bool
	// decode returns the value again, of the fields that Egret has alone, and what was left out of it.
	decode func(value []byte) (json.RawMessage, error)
}

// What crdsync writes for itself; its own types are these.
type (
	counter struct {
		Last int `json:"last"`
	}
	eventRecord struct {
		UID      string            `json:"uid"`
		Changes  int               `json:"changes"`
		Nodes    map[string]string `json:"nodes,omitempty"`
		Warnings []string          `json:"warnings,omitempty"`
	}
	compaction struct {
		Revisions []struct {
			Revision int64     `json:"revision"`
			At       time.Time `json:"at"`
		} `json:"revisions"`
	}
)

// electionPrefix is below what replicas of crdsync stand for election.
const electionPrefix = "elections/crdsync/"

// kinds are all that Egret keeps in etcd.
var kinds = []kind{
	{"acts", store.ActPrefix, false, as[egress.Act]},
	{"agents", store.AgentPrefix, false, as[egress.Agent]},
	{"allocations", store.AllocationPrefix, false, as[egress.Allocation]},
	{"blocks", store.BlockPrefix, false, as[egress.Block]},
	{"blocks-history", store.BlockHistoryPrefix, false, as[egress.BlockTenure]},
	{"cloud", store.CloudPrefix, false, as[egress.CloudAddress]},
	{"compaction", store.CompactionKey, true, as[compaction]},
	{"cordons", store.CordonPrefix, false, as[egress.Cordon]},
	{"counters", store.CounterPrefix, false, as[counter]},
	{"egresses", store.EgressPrefix, false, as[egress.Policy]},
	{"elections", electionPrefix, false, quoted},
	{"history", store.HistoryPrefix, false, as[egress.Tenure]},
	{"ids", store.IDPrefix, false, as[egress.IDRecord]},
	{"members-by-egress", store.MembersByEgress, false, as[egress.Members]},
	{"members-by-node", store.MembersByNode, false, as[egress.Members]},
	{"moves", store.MovePrefix, false, as[egress.Move]},
	{"nodes", store.NodePrefix, false, as[egress.Node]},
	{"owners", store.OwnerPrefix, false, as[egress.Owner]},
	{"permit", store.PermitKey, true, as[egress.Permits]},
	{"pins", store.PinPrefix, false, as[egress.Pin]},
	{"pods", store.PodPrefix, false, as[egress.PodRanges]},
	{"pools", store.PoolPrefix, false, as[egress.Pool]},
	{"services", store.ServicePrefix, false, as[egress.ServiceCIDR]},
	{"suspicions", store.SuspicionPrefix, false, as[egress.Suspicion]},
	{"told", store.EventRecordPrefix, false, as[eventRecord]},
}

// errMore says that a value has fields that the type has not.
var errMore = errors.New("fields that this version does not know are left out")

// as reads a record as a T, and writes it again.
func as[T any](value []byte) (json.RawMessage, error) {
	var v T
	d := json.NewDecoder(bytes.NewReader(value))
	d.DisallowUnknownFields()
	var more error
	if d.Decode(&v) != nil || d.More() {
		more, v = errMore, *new(T)
		if json.Unmarshal(value, &v) != nil {
			return nil, errors.New("it is no such record: the value is left out")
		}
	}
	out, err := json.Marshal(v)
	return out, errors.Join(err, more)
}

// quoted reads a record that is a name.
func quoted(value []byte) (json.RawMessage, error) {
	const most = 253 // of a name in Kubernetes
	if len(value) > most {
		return nil, errors.New("it is no name: the value is left out")
	}
	return json.Marshal(string(value))
}

// record is a line of a file of records.
type record struct {
	Key      string          `json:"key"` // without the prefix
	Revision int64           `json:"revision"`
	Created  int64           `json:"created"` // the revision
	Lease    string          `json:"lease,omitempty"`
	Value    json.RawMessage `json:"value,omitempty"`
	Bytes    int             `json:"bytes,omitempty"` // of a value that is left out
	Note     string          `json:"note,omitempty"`
}

// page is how many records are asked for at once. The largest, the pods of an egress on a node, are some kilobytes.
const page = 500

// each calls f with the records of a kind, by key and page by page, all as they were at one revision.
func (k kind) each(ctx context.Context, c *store.Client, f func(r record) error) error {
	from, options := c.Prefix()+k.prefix, []clientv3.OpOption{clientv3.WithLimit(page)}
	if !k.one {
		options = append(options, clientv3.WithRange(clientv3.GetPrefixRangeEnd(from)))
	}
	for revision := int64(0); ; {
		resp, err := c.Etcd().Get(ctx, from, append(slices.Clone(options), clientv3.WithRev(revision))...)
		if err != nil {
			return fmt.Errorf("reading %s: %w", k.prefix, err)
		}
		for _, kv := range resp.Kvs {
			r := record{Key: strings.TrimPrefix(string(kv.Key), c.Prefix()), Revision: kv.ModRevision, Created: kv.CreateRevision}
			if kv.Lease != 0 {
				r.Lease = egress.FormatLease(kv.Lease)
			}
			if r.Value, err = k.decode(kv.Value); err != nil {
				r.Note = err.Error()
			}
			if r.Value == nil {
				r.Bytes = len(kv.Value)
			}
			if err := f(r); err != nil {
				return err
			}
			from = string(kv.Key) + "\x00"
		}
		if !resp.More {
			return nil
		}
		revision = resp.Header.Revision
	}
}

// etcd collects what there is of etcd.
func (a *archive) etcd(ctx context.Context, cfg Config) {
	c := cfg.Client
	if c == nil {
		a.add("etcd", text, nil, 0, fmt.Errorf("etcd was not asked: %w", cfg.Unreached))
		return
	}
	a.part(ctx, "etcd/members.json", object, func(ctx context.Context, w io.Writer) error {
		space, err := c.Space(ctx)
		if err != nil {
			return err
		}
		fault := ""
		if space.Fault != nil {
			fault = space.Fault.Error()
		}
		for i := range space.Members {
			space.Members[i].Endpoint = plain([]string{space.Members[i].Endpoint})[0]
		}
		return json.NewEncoder(w).Encode(map[string]any{"members": space.Members, "revision": space.Revision, "nospace": space.NoSpace, "fault": fault})
	})
	a.part(ctx, "etcd/alarms.json", object, func(ctx context.Context, w io.Writer) error {
		list, err := c.Etcd().AlarmList(ctx)
		if err != nil {
			return fmt.Errorf("listing the alarms of etcd: %w", err)
		}
		alarms := []string{}
		for _, m := range list.Alarms {
			alarms = append(alarms, fmt.Sprintf("%s of member %x", m.Alarm, m.MemberID))
		}
		return json.NewEncoder(w).Encode(alarms)
	})
	for _, k := range kinds {
		a.records(ctx, c, k)
	}
	a.part(ctx, "etcd/others.txt", text, func(ctx context.Context, w io.Writer) error { return others(ctx, c, w) })
	a.whole(ctx, c)
}

// records writes the records of a kind, into as many files as they fill.
func (a *archive) records(ctx context.Context, c *store.Client, k kind) {
	began, n := time.Now(), 0
	var data bytes.Buffer
	flush := func(err error) {
		name := fmt.Sprintf("records/%s.jsonl", k.file)
		if n > 0 {
			name = fmt.Sprintf("records/%s-%d.jsonl", k.file, n)
		}
		n++
		a.add(name, lines, data.Bytes(), time.Since(began), err)
		data.Reset()
		began = time.Now()
	}
	ctx, cancel := context.WithTimeout(ctx, partTimeout)
	defer cancel()
	err := k.each(ctx, c, func(r record) error {
		if a.left < int64(data.Len()) {
			return fmt.Errorf("the archive has its %d MB", maxTotal>>20)
		}
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		a.bytes += len(line)
		if data.Len()+len(line) > a.chunk {
			flush(nil)
		}
		data.Write(append(line, '\n'))
		return nil
	})
	flush(err)
}

// others counts what is below the prefix and not Egret's. It may be anything, so it is not read.
func others(ctx context.Context, c *store.Client, w io.Writer) error {
	n := 0
	err := c.EachKey(ctx, "", 10000, func(key string) error {
		if !slices.ContainsFunc(kinds, func(k kind) bool { return k.one && key == k.prefix || !k.one && strings.HasPrefix(key, k.prefix) }) {
			n++
		}
		return ctx.Err()
	})
	fmt.Fprintf(w, "%d keys below %s are none of Egret's, and were not read\n", n, c.Prefix())
	return err
}

// whole writes what the operator's commands say.
func (a *archive) whole(ctx context.Context, c *store.Client) {
	if a.bytes > maxWhole {
		a.add("status.txt", text, nil, 0, fmt.Errorf("left out, as all that commands say: the records have %d MB, which would all be in memory; `egret status` prints it", a.bytes>>20))
		return
	}
	a.part(ctx, "status.txt", text, func(ctx context.Context, w io.Writer) error { return operator.Status(ctx, c, "", w) })
	a.part(ctx, "status.json", object, func(ctx context.Context, w io.Writer) error { return operator.Status(ctx, c, "json", w) })
	for _, kind := range operator.Kinds {
		a.part(ctx, "tables/"+kind+".txt", text, func(ctx context.Context, w io.Writer) error { return operator.Get(ctx, c, kind, "", w) })
	}
	began := time.Now()
	const most = 100
	left, err := operator.DescribeWrong(ctx, c, most, func(n int, kind, name string, description []byte) {
		words := fmt.Appendf(nil, "$ egret describe %s %s\n", kind, name)
		a.add(fmt.Sprintf("describe/%03d.txt", n), text, append(words, description...), time.Since(began), nil)
		began = time.Now()
	})
	if err == nil && left > 0 {
		err = fmt.Errorf("%d things more have something wrong: status.json names all", left)
	}
	if err != nil {
		a.add("describe", text, nil, time.Since(began), err)
	}
}
