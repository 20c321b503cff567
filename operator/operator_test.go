package operator

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

var ip = netip.MustParseAddr("10.10.0.11")

// snapshot returns two live nodes, of which node-1 holds ip.
func snapshot() *egress.Snapshot {
	return &egress.Snapshot{
		Pools:    map[string]egress.Pool{"pool": {Name: "pool"}},
		Egresses: map[string]egress.Policy{"web": {Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}}},
		Nodes:    map[string]egress.Node{"node-1": {Name: "node-1"}, "node-2": {Name: "node-2"}},
		Agents:   map[string]egress.Agent{"node-1": {Node: "node-1"}, "node-2": {Node: "node-2"}},
		Owners:   map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "node-1"}},
		Cordons:  map[string]egress.Cordon{},
	}
}

func TestRefusalSaysWhatIsInTheWay(t *testing.T) {
	tests := map[string]struct {
		change func(*egress.Snapshot)
		want   string // "": not refused
	}{
		"nothing is in the way": {func(*egress.Snapshot) {}, ""},
		"unused IP":             {func(s *egress.Snapshot) { clear(s.Egresses) }, "no egress uses"},
		"static IP": {func(s *egress.Snapshot) {
			s.Egresses["web"] = egress.Policy{Addresses: []egress.Address{{IP: ip, ID: 1}}}
		}, "static"},
		"unknown node":     {func(s *egress.Snapshot) { delete(s.Nodes, "node-2") }, "no such node"},
		"agent is down":    {func(s *egress.Snapshot) { delete(s.Agents, "node-2") }, "agent is down"},
		"node is cordoned": {func(s *egress.Snapshot) { s.Cordons["node-2"] = egress.Cordon{Node: "node-2"} }, "cordoned"},
		"pool selects other nodes": {func(s *egress.Snapshot) {
			s.Pools["pool"] = egress.Pool{Name: "pool", NodeSelector: egress.Selector{MatchLabels: map[string]string{"role": "gateway"}}}
		}, "pool pool does not select"},
		"node is full": {func(s *egress.Snapshot) {
			s.Nodes["node-2"] = egress.Node{Name: "node-2", Capacity: 1}
			s.Owners[ip.Next()] = egress.Owner{IP: ip.Next(), Node: "node-2"}
		}, "1 egress IPs"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := snapshot()
			tt.change(s)
			err := refusal(s, ip, "node-2")
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("refusal: %v, want %q", err, tt.want)
			}
		})
	}
}

// client returns a client of a new etcd.
func client(t *testing.T) *store.Client {
	t.Helper()
	c, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcdtest.New(t).Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func put(t *testing.T, c *store.Client, key string, record any) {
	t.Helper()
	value, err := store.Encode(record)
	if err != nil {
		t.Fatal(err)
	}
	if text, ok := record.(string); ok {
		value = []byte(text)
	}
	if _, err := c.Etcd().Put(t.Context(), c.Prefix()+key, string(value)); err != nil {
		t.Fatal(err)
	}
}

func TestGetPrintsEveryKindInEveryFormat(t *testing.T) {
	c := client(t)
	put(t, c, store.NodeKey("node-1"), egress.Node{Name: "node-1", Index: 1, Addresses: []netip.Addr{netip.MustParseAddr("10.10.0.101")}})
	put(t, c, store.PoolKey("pool"), egress.Pool{Name: "pool", Ranges: []egress.Range{{Start: ip, End: ip.Next()}}})
	put(t, c, store.EgressKey("web"), egress.Policy{Name: "web", Created: time.Now(), Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}})
	put(t, c, store.AllocationKey(ip), egress.Allocation{IP: ip, Pool: "pool", ID: 1, Egresses: []string{"web"}, Since: time.Now()})
	put(t, c, store.OwnerKey(ip), egress.Owner{IP: ip, Node: "node-1", Why: egress.ReasonClaim, Since: time.Now()})
	for kind, want := range map[string][]string{
		"allocations": {"10.10.0.11", "pool", "web"},
		"owners":      {"10.10.0.11", "node-1", "claim"},
		"nodes":       {"node-1", "10.10.0.101", "down"},
		"egresses":    {"web", "10.10.0.11", "pool", "node-1"},
		"pools":       {"pool", "10.10.0.11-10.10.0.12", "2", "1"},
	} {
		var table, asJSON, asYAML bytes.Buffer
		if err := Get(t.Context(), c, kind, "", &table); err != nil {
			t.Errorf("get %s: %v", kind, err)
		}
		lines := strings.Split(strings.TrimSpace(table.String()), "\n")
		if len(lines) != 2 {
			t.Errorf("get %s: want a header and a row, got\n%s", kind, table.String())
			continue
		}
		for _, word := range want {
			if !strings.Contains(lines[1], word) {
				t.Errorf("get %s: %q is not in\n%s", kind, word, table.String())
			}
		}
		if err := Get(t.Context(), c, kind, "json", &asJSON); err != nil || !strings.HasPrefix(asJSON.String(), "[\n") {
			t.Errorf("get %s as JSON: %v\n%s", kind, err, asJSON.String())
		}
		if err := Get(t.Context(), c, kind, "yaml", &asYAML); err != nil || !strings.HasPrefix(asYAML.String(), "- ") {
			t.Errorf("get %s as YAML: %v\n%s", kind, err, asYAML.String())
		}
	}
	put(t, c, store.PoolKey("broken"), "no JSON")
	var out bytes.Buffer
	if err := Get(t.Context(), c, "pools", "", &out); err == nil || !strings.Contains(err.Error(), "pools/broken") || !strings.Contains(out.String(), "10.10.0.11-10.10.0.12") {
		t.Errorf("with a broken record: %v\n%s\nwant the others, and an error that names it", err, out.String())
	}
}

func TestMoveThatNobodyMakesIsWithdrawn(t *testing.T) {
	c := client(t)
	for _, n := range []string{"node-1", "node-2"} {
		put(t, c, store.NodeKey(n), egress.Node{Name: n, Index: 1, Addresses: []netip.Addr{netip.MustParseAddr("10.10.0.101")}})
		put(t, c, store.AgentKey(n), egress.Agent{Node: n, Lease: "1"})
	}
	put(t, c, store.PoolKey("pool"), egress.Pool{Name: "pool", Ranges: []egress.Range{{Start: ip, End: ip}}})
	put(t, c, store.EgressKey("web"), egress.Policy{Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}})
	put(t, c, store.OwnerKey(ip), egress.Owner{IP: ip, Node: "node-1"})
	var out bytes.Buffer
	if err := Move(t.Context(), c, ip, "node-1", 2*time.Second, &out); err != nil || !strings.Contains(out.String(), "already") {
		t.Errorf("to where it is: %v\n%s", err, out.String())
	}
	err := Move(t.Context(), c, ip, "node-2", 2*time.Second, &out)
	if err == nil || !strings.Contains(err.Error(), "withdrawn") {
		t.Errorf("no agent runs: %v, want an error that says that the request is withdrawn", err)
	}
	all, err := c.ReadAll(t.Context())
	if err != nil || len(all.Moves) > 0 {
		t.Errorf("requests left: %v, %v", all.Moves, err)
	}
}
