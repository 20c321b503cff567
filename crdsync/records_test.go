package crdsync

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"reflect"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// records returns what etcd holds below the prefix of Egret but the elections, and the revisions of the keys.
func (c *cluster) records() (values map[string]string, revisions map[string]int64) {
	c.Helper()
	resp, err := c.direct().Get(c.Context(), store.DefaultPrefix, clientv3.WithPrefix())
	if err != nil {
		c.Fatal(err)
	}
	values, revisions = map[string]string{}, map[string]int64{}
	for _, kv := range resp.Kvs {
		key := strings.TrimPrefix(string(kv.Key), store.DefaultPrefix)
		if !strings.HasPrefix(key, "elections/") {
			values[key], revisions[key] = string(kv.Value), kv.ModRevision
		}
	}
	return values, revisions
}

// put writes a record, as an agent does.
func (c *cluster) put(key string, v any) {
	c.Helper()
	b, err := store.Encode(v)
	if err == nil {
		_, err = c.direct().Put(c.Context(), store.DefaultPrefix+key, string(b))
	}
	if err != nil {
		c.Fatal(err)
	}
}

// eventually waits until check returns nil.
func (c *cluster) eventually(check func() error) {
	c.Helper()
	ctx, cancel := context.WithTimeout(c.Context(), deadline)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			values, _ := c.records()
			for _, key := range slices.Sorted(maps.Keys(values)) {
				c.Logf("%s = %s", key, values[key])
			}
			c.Fatalf("not within %v: %v", deadline, err)
		}
	}
}

// wantRecords waits until the records of some kinds are as described: key -> description; see describe. A pattern says
// which keys.
func (c *cluster) wantRecords(pattern string, want map[string]string) {
	c.Helper()
	c.eventually(func() error {
		values, _ := c.records()
		got := map[string]string{}
		for key, value := range values {
			if ok, err := path.Match(pattern, key); err != nil {
				c.Fatal(err)
			} else if ok {
				got[key] = c.describe(key, value)
			}
		}
		if !maps.Equal(want, got) {
			return fmt.Errorf("%s: got %v, want %v", pattern, got, want)
		}
		return nil
	})
}

// describe returns the part of a record that tests are about: "pod=ip ..." of members, "ip/id ..." of an egress,
// "pool/id egress ..." of an allocation, "index address ..." of a node, else the value.
func (c *cluster) describe(key, value string) string {
	c.Helper()
	r := store.Record{Value: []byte(value)}
	var out []string
	var err error
	switch {
	case strings.HasPrefix(key, "members/"):
		var m egress.Members
		m, err = store.Decode[egress.Members](r)
		for _, p := range m.Pods {
			for _, ip := range p.IPs {
				out = append(out, p.Pod+"="+ip.String())
			}
		}
	case strings.HasPrefix(key, store.EgressPrefix):
		var p egress.Policy
		p, err = store.Decode[egress.Policy](r)
		for _, a := range p.Addresses {
			out = append(out, fmt.Sprintf("%s/%d", a.IP, a.ID))
		}
	case strings.HasPrefix(key, store.AllocationPrefix):
		var a egress.Allocation
		a, err = store.Decode[egress.Allocation](r)
		out = append([]string{fmt.Sprintf("%s/%d", a.Pool, a.ID)}, a.Egresses...)
	case strings.HasPrefix(key, store.NodePrefix):
		var n egress.Node
		n, err = store.Decode[egress.Node](r)
		out = []string{fmt.Sprint(n.Index)}
		for _, a := range n.Addresses {
			out = append(out, a.String())
		}
	default:
		return value
	}
	if err != nil {
		return err.Error()
	}
	return strings.Join(out, " ")
}

// wantStatus waits until the status of an egress is as described: "ip node IPAllocated's status, reason IPAssigned's
// status, reason".
func (c *cluster) wantStatus(name, want string) {
	c.Helper()
	c.eventually(func() error {
		u, err := c.dyn.Resource(v1beta1.EgressResource).Get(c.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		var e v1beta1.Egress
		b, err := json.Marshal(u.Object)
		if err == nil {
			err = json.Unmarshal(b, &e)
		}
		if err != nil {
			return err
		}
		got := e.Status.EgressIP + " " + e.Status.EgressNode
		for _, condition := range e.Status.Conditions {
			got += " " + string(condition.Status) + " " + condition.Reason
		}
		if got != want {
			return fmt.Errorf("status of %s: got %q, want %q: %+v", name, got, want, e.Status)
		}
		return nil
	})
}

// wantUsage waits until the status of a pool says so.
func (c *cluster) wantUsage(name string, total, used int64) {
	c.Helper()
	want := map[string]any{"usage": map[string]any{"total": total, "used": used}}
	c.eventually(func() error {
		p, err := c.dyn.Resource(v1beta1.PoolResource).Get(c.Context(), name, metav1.GetOptions{})
		if err == nil && !reflect.DeepEqual(p.Object["status"], any(want)) {
			err = fmt.Errorf("status of pool %s: got %v, want %v", name, p.Object["status"], want)
		}
		return err
	})
}
