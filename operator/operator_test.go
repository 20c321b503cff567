package operator

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/syncbuf"
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

func TestGetNodesShowsAgentsWhoseNodeIsGone(t *testing.T) {
	s := snapshot()
	delete(s.Nodes, "node-1")
	l := list("nodes", store.Everything{Snapshot: *s}, time.Now())
	if len(l.rows) != 2 || len(l.records) != 1 || strings.Join(l.rows[1][:5], " ") != "node-1 - gone up - 1" {
		t.Errorf("rows %q", l.rows)
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
		"agent restarts":   {func(s *egress.Snapshot) { s.Agents["node-2"] = egress.Agent{Node: "node-2", Restarting: true} }, "restarts"},
		"node is cordoned": {func(s *egress.Snapshot) { s.Cordons["node-2"] = egress.Cordon{Node: "node-2"} }, "cordoned"},
		"pool selects other nodes": {func(s *egress.Snapshot) {
			s.Pools["pool"] = egress.Pool{Name: "pool", NodeSelector: egress.Selector{MatchLabels: map[string]string{"role": "gateway"}}}
		}, "pool pool does not select"},
		"node is cordoned in Kubernetes": {func(s *egress.Snapshot) { s.Nodes["node-2"] = egress.Node{Name: "node-2", Cordoned: true} }, "cordoned"},
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

func TestObjectionCanBeOverruled(t *testing.T) {
	full := func(s *egress.Snapshot) {
		s.Nodes["node-2"] = egress.Node{Name: "node-2", Capacity: 1}
		s.Egresses["api"] = egress.Policy{Name: "api", Addresses: []egress.Address{{IP: ip.Next(), ID: 2, Pool: "pool"}}}
		s.Owners[ip.Next()] = egress.Owner{IP: ip.Next(), Node: "node-2"}
	}
	pinned := func(s *egress.Snapshot) { s.Pins = map[netip.Addr]egress.Pin{ip: {IP: ip, Node: "node-1"}} }
	tests := map[string]struct {
		change func(*egress.Snapshot)
		pin    bool
		want   string // "": no objection
	}{
		"nothing is in the way": {func(*egress.Snapshot) {}, false, ""},
		"the target is full":    {full, false, "1 egress IPs"},
		"full, with the IP already": {func(s *egress.Snapshot) {
			full(s)
			delete(s.Owners, ip.Next())
			s.Owners[ip] = egress.Owner{IP: ip, Node: "node-2"}
		}, false, ""},
		"room for one of two": {func(s *egress.Snapshot) {
			s.Nodes["node-2"] = egress.Node{Name: "node-2", Capacity: 1}
			p := s.Egresses["web"]
			p.Addresses = append(p.Addresses, egress.Address{IP: netip.MustParseAddr("fd10::11"), ID: 3, Pool: "pool"})
			s.Egresses["web"] = p
		}, false, "0 egress IPs and may hold 1"},
		"a static IP takes no room": {func(s *egress.Snapshot) {
			full(s)
			s.Egresses["api"] = egress.Policy{Name: "api", Addresses: []egress.Address{{IP: ip.Next(), ID: 2}}}
		}, false, ""},
		"the IP that moves with it is pinned elsewhere": {func(s *egress.Snapshot) {
			p := s.Egresses["web"]
			p.Addresses = append(p.Addresses, egress.Address{IP: netip.MustParseAddr("fd10::11"), ID: 3, Pool: "pool"})
			s.Egresses["web"], s.Pins = p, map[netip.Addr]egress.Pin{netip.MustParseAddr("fd10::11"): {Node: "node-3"}}
		}, true, "egret unpin fd10::11"},
		"pinned elsewhere":              {pinned, false, "egret unpin 10.10.0.11"},
		"pinned elsewhere, pinned anew": {pinned, true, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := snapshot()
			tt.change(s)
			err := objection(s, MoveConfig{IP: ip, To: "node-2", Pin: tt.pin})
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("objection: %v, want %q", err, tt.want)
			}
		})
	}
}

// client returns a client of a new etcd.
func client(t *testing.T) *store.Client { t.Helper(); return clientOf(t, etcdtest.New(t)) }

func clientOf(t *testing.T, server *etcdtest.Server) *store.Client {
	t.Helper()
	c, err := store.Dial(t.Context(), store.Config{Endpoints: []string{server.Endpoint()}})
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

func del(t *testing.T, c *store.Client, key string) {
	t.Helper()
	if _, err := c.Etcd().Delete(t.Context(), c.Prefix()+key); err != nil {
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
	put(t, c, store.CordonKey("node-2"), egress.Cordon{Node: "node-2", Why: "fan"})
	put(t, c, store.PinKey(ip), egress.Pin{IP: ip, Node: "node-1"})
	for kind, want := range map[string][]string{
		"allocations": {"10.10.0.11", "pool", "web"},
		"owners":      {"10.10.0.11", "node-1", "claim"},
		"nodes":       {"node-1", "10.10.0.101", "down"},
		"cordons":     {"node-2", "fan"},
		"pins":        {"10.10.0.11", "node-1"},
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

func TestGetBlocksSaysWhoseThePortsAre(t *testing.T) {
	c := client(t)
	other := netip.MustParseAddr("fd00::11")
	now := time.Now()
	for _, b := range []egress.Block{
		{IP: ip, First: 2048, Size: 1024, Node: "node-1", Since: now.Add(-time.Hour), Retired: true},
		{IP: ip, First: 3072, Size: 64, Node: "node-2", Since: now.Add(-3 * time.Hour), Freed: now.Add(-3 * time.Minute)},
		{IP: ip, First: 32768, Size: 32768, Node: "node-1", Since: now.Add(-5 * time.Minute)},
		{IP: other, First: 2048, Size: 64, Node: "node-1", Since: now.Add(-49 * time.Hour)},
	} {
		put(t, c, store.BlockKey(b.IP, b.First), b)
	}
	get := func(of netip.Addr, format string) (string, error) {
		var out bytes.Buffer
		err := Blocks(t.Context(), c, of, format, &out)
		return out.String(), err
	}
	put(t, c, store.AgentKey("node-1"), egress.Agent{Node: "node-1", Lease: "1", Ports: map[netip.Addr]egress.PortUse{
		ip: {Want: 8192, Used: 17, Drained: []uint16{2048}}, other: {Drained: []uint16{4096}},
	}})
	put(t, c, store.AgentKey("node-2"), egress.Agent{Node: "node-2", Lease: "2", Ports: map[netip.Addr]egress.PortUse{ip: {Want: 128, Used: 60}}})
	want := `IP           PORTS         SIZE    NODE     STATE     SINCE   IN-USE   WANTS
10.10.0.11   2048-3071     1024    node-1   retired   60m     -        -
10.10.0.11   3072-3135     64      node-2   resting   3m      -        -
10.10.0.11   32768-65535   32768   node-1   used      5m      17       8192
fd00::11     2048-2111     64      node-1   used      2d      -        -
`
	got, err := get(netip.Addr{}, "")
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
	put(t, c, store.BlockKey(other, 4096), "no JSON")
	if got, err = get(ip, ""); err != nil || strings.Count(got, "\n") != 4 || strings.Contains(got, "fd00") {
		t.Errorf("those of one IP: %v\n%s", err, got)
	}
	if got, err = get(other, "json"); err == nil || !strings.Contains(err.Error(), "blocks/fd00::11/04096") || !strings.Contains(got, `"first": 2048`) {
		t.Errorf("with a broken record: %v\n%s\nwant the others, and an error that names it", err, got)
	}
	if got, err = get(netip.MustParseAddr("10.10.0.1"), "json"); err != nil || strings.TrimSpace(got) != "[]" {
		t.Errorf("an IP whose text begins another's: %v\n%s", err, got)
	}
	var out bytes.Buffer
	if err := Get(t.Context(), c, KindBlocks, "", &out); err == nil || !strings.HasPrefix(out.String(), want) {
		t.Errorf("get of all kinds: %v\n%s", err, out.String())
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
	if err := Move(t.Context(), c, MoveConfig{IP: ip, To: "node-1", Patience: 2 * time.Second}, &out); err != nil || !strings.Contains(out.String(), "already") {
		t.Errorf("to where it is: %v\n%s", err, out.String())
	}
	err := Move(t.Context(), c, MoveConfig{IP: ip, To: "node-2", Patience: 2 * time.Second}, &out)
	if err == nil || !strings.Contains(err.Error(), "withdrawn") {
		t.Errorf("no agent runs: %v, want an error that says that the request is withdrawn", err)
	}
	all, err := c.ReadAll(t.Context())
	if err != nil || len(all.Moves) > 0 {
		t.Errorf("requests left: %v, %v", all.Moves, err)
	}
}

// seeded puts two nodes, of which node-1 holds ip and a static IP, and agents that do nothing.
func seeded(t *testing.T, c *store.Client) {
	t.Helper()
	for _, n := range []string{"node-1", "node-2"} {
		put(t, c, store.NodeKey(n), egress.Node{Name: n, Index: 1, Addresses: []netip.Addr{netip.MustParseAddr("10.10.0.101")}})
		put(t, c, store.AgentKey(n), egress.Agent{Node: n, Lease: "1"})
	}
	static := netip.MustParseAddr("10.10.0.101")
	put(t, c, store.PoolKey("pool"), egress.Pool{Name: "pool", Ranges: []egress.Range{{Start: ip, End: ip}}})
	put(t, c, store.EgressKey("web"), egress.Policy{Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}})
	put(t, c, store.EgressKey("static"), egress.Policy{Name: "static", Addresses: []egress.Address{{IP: static, ID: 2}}})
	put(t, c, store.OwnerKey(ip), egress.Owner{IP: ip, Node: "node-1"})
	put(t, c, store.OwnerKey(static), egress.Owner{IP: static, Node: "node-1"})
}

func TestDrainSaysWhatLeavesAndWhatIsLeft(t *testing.T) {
	c := client(t)
	seeded(t, c)
	var out bytes.Buffer
	if err := Drain(t.Context(), c, "node-9", 0, &out); err == nil || !strings.Contains(err.Error(), "no such node") {
		t.Errorf("unknown node: %v", err)
	}
	if err := Drain(t.Context(), c, "node-1", 0, &out); err != nil || out.String() != "node-1: cordoned\nnode-1: 1 egress IPs to give away\n" {
		t.Errorf("without waiting: %v\n%s", err, out.String())
	}
	err := Drain(t.Context(), c, "node-1", 300*time.Millisecond, &out)
	if err == nil || !strings.Contains(err.Error(), "draining node-1: 2 egress IPs left") || !strings.Contains(err.Error(), "10.10.0.11: it waits for its turn") {
		t.Errorf("nobody moves it: %v", err)
	}
	if err := Cordon(t.Context(), c, "node-2", &out); err != nil {
		t.Fatal(err)
	}
	err = Drain(t.Context(), c, "node-1", 300*time.Millisecond, &out)
	if err == nil || !strings.Contains(err.Error(), "10.10.0.11: no other node that pool pool selects") {
		t.Errorf("nobody can take it: %v", err)
	}
	out.Reset()
	done := make(chan error, 1)
	go func() { done <- Drain(t.Context(), c, "node-1", 20*time.Second, &out) }()
	put(t, c, store.OwnerKey(ip), egress.Owner{IP: ip, Node: "node-2"})
	if err := <-done; err == nil || !strings.Contains(err.Error(), "draining node-1: 1 egress IPs left") || !strings.Contains(err.Error(), "10.10.0.101: it is static") {
		t.Errorf("a static IP is left: %v\n%s", err, out.String())
	}
	del(t, c, store.OwnerKey(netip.MustParseAddr("10.10.0.101")))
	if err := Drain(t.Context(), c, "node-1", 20*time.Second, &out); err != nil || !strings.HasSuffix(out.String(), "node-1: drained\n") {
		t.Errorf("when all have left: %v\n%s", err, out.String())
	}
	out.Reset()
	for _, want := range []string{"node-1: uncordoned\n", "node-1 is not cordoned\n"} {
		if err := Uncordon(t.Context(), c, "node-1", &out); err != nil || out.String() != want {
			t.Errorf("uncordon: %v, %q, want %q", err, out.String(), want)
		}
		out.Reset()
	}
	put(t, c, store.NodeKey("node-1"), egress.Node{Name: "node-1", Index: 1, Cordoned: true})
	for _, cordoned := range []bool{false, true} {
		want := "there is no cordon of Egret's"
		if cordoned {
			if want = "Egret's own cordon is off"; Cordon(t.Context(), c, "node-1", &out) != nil {
				t.Fatal("not cordoned")
			}
		}
		err := Uncordon(t.Context(), c, "node-1", &out)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "kubectl uncordon node-1") {
			t.Errorf("cordoned in Kubernetes: %v, want an error that says so, and %q", err, want)
		}
	}
}

func TestAnUncordonSaysWhatIsOffAndWhatIsLeft(t *testing.T) {
	for done, want := range map[bool]string{
		true: "node-1: Egret's own cordon is off, and it still takes no", false: "node-1: there is no cordon of Egret's, and it still takes no",
	} {
		if err := stillCordoned("node-1", done); !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "`kubectl uncordon node-1`") {
			t.Errorf("%v; want %q, and what to do", err, want)
		}
	}
}

// TestDrainWaitsForWhatCameMeanwhile: a claim may be on its way when the node is cordoned, and be seen later than what
// leaves.
func TestDrainWaitsForWhatCameMeanwhile(t *testing.T) {
	c := client(t)
	seeded(t, c)
	del(t, c, store.OwnerKey(netip.MustParseAddr("10.10.0.101")))
	late := ip.Next()
	put(t, c, store.EgressKey("late"), egress.Policy{Name: "late", Addresses: []egress.Address{{IP: late, ID: 3, Pool: "pool"}}})
	var out lines
	done := make(chan error, 1)
	go func() { done <- Drain(t.Context(), c, "node-1", 20*time.Second, &out) }()
	out.wait(t, "1 egress IPs to give away")
	put(t, c, store.OwnerKey(late), egress.Owner{IP: late, Node: "node-1"})
	put(t, c, store.OwnerKey(ip), egress.Owner{IP: ip, Node: "node-2"})
	out.wait(t, "10.10.0.11: node-1 -> node-2")
	select {
	case err := <-done:
		t.Fatalf("it ended while the node held %s: %v", late, err)
	case <-time.After(300 * time.Millisecond):
	}
	put(t, c, store.OwnerKey(late), egress.Owner{IP: late, Node: "node-2"})
	if err := <-done; err != nil {
		t.Error(err)
	}
	out.wait(t, "10.10.0.12: node-1 -> node-2")
}

func TestDrainEndsWhenTheCordonDoes(t *testing.T) {
	c := client(t)
	seeded(t, c)
	var out lines
	done := make(chan error, 1)
	go func() { done <- Drain(t.Context(), c, "node-1", 20*time.Second, &out) }()
	out.wait(t, "1 egress IPs to give away")
	if err := Uncordon(t.Context(), c, "node-1", &out); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), "uncordoned meanwhile") {
		t.Errorf("got %v", err)
	}
}

func TestMoveToANodeWhoseAgentBeginsToRestartSaysSoAtOnce(t *testing.T) {
	c := client(t)
	seeded(t, c)
	var out lines
	done := make(chan error, 1)
	began := time.Now()
	go func() {
		done <- Move(t.Context(), c, MoveConfig{IP: ip, To: "node-2", Patience: 20 * time.Second}, &out)
	}()
	out.wait(t, "asked node-2")
	put(t, c, store.AgentKey("node-2"), egress.Agent{Node: "node-2", Lease: "2", Restarting: true})
	err := <-done
	if err == nil || !strings.Contains(err.Error(), "restarts") || !strings.Contains(err.Error(), "withdrawn") || time.Since(began) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	if all, err := c.ReadAll(t.Context()); err != nil || len(all.Moves) > 0 {
		t.Errorf("requests %v, %v; want none", all.Moves, err)
	}
}

// lines is what a command printed so far.
type lines struct{ syncbuf.Buffer }

// wait waits until the command has printed text.
func (l *lines) wait(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; {
		got := l.String()
		if strings.Contains(got, text) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("printed %q, want %q", got, text)
		}
		<-time.After(10 * time.Millisecond)
	}
}

func TestPinOutlivesTheMoveUntilItIsDropped(t *testing.T) {
	c := client(t)
	seeded(t, c)
	var out bytes.Buffer
	if err := Move(t.Context(), c, MoveConfig{IP: ip, To: "node-1", Pin: true, Patience: 2 * time.Second}, &out); err != nil {
		t.Fatal(err)
	}
	if err := Get(t.Context(), c, "pins", "", &out); err != nil || !strings.Contains(out.String(), "10.10.0.11   node-1") {
		t.Errorf("get pins: %v\n%s", err, out.String())
	}
	err := Move(t.Context(), c, MoveConfig{IP: ip, To: "node-2", Patience: 2 * time.Second}, &out)
	if err == nil || !strings.Contains(err.Error(), "pinned to node-1") {
		t.Errorf("away from its pin: %v, want a refusal that names the pin", err)
	}
	out.Reset()
	for _, want := range []string{"10.10.0.11: unpinned\n", "10.10.0.11 is not pinned\n"} {
		if err := Unpin(t.Context(), c, ip, &out); err != nil || out.String() != want {
			t.Errorf("unpin: %v, %q, want %q", err, out.String(), want)
		}
		out.Reset()
	}
}

func TestHistoryOfAnIPThatThereIsNotIsAnError(t *testing.T) {
	c := client(t)
	var out bytes.Buffer
	err := History(t.Context(), c, ip, "json", &out)
	if err == nil || !strings.Contains(err.Error(), ip.String()) || !strings.Contains(err.Error(), "`egret get allocations`") || out.Len() > 0 {
		t.Errorf("%v, %q", err, out.String())
	}
	put(t, c, store.AllocationKey(ip), egress.Allocation{IP: ip, Pool: "pool", ID: 1}) // which nobody held yet
	if err := History(t.Context(), c, ip, "json", &out); err != nil || out.String() != "[]\n" {
		t.Errorf("%v, %q", err, out.String())
	}
}

func TestHistorySaysWhoHeldItWhenAndWhy(t *testing.T) {
	c := client(t)
	at := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	for i, h := range []egress.Tenure{
		{Node: "node-1", Why: egress.ReasonClaim},
		{Node: "node-2", Why: egress.ReasonDrain, From: "node-1", By: "alice@laptop"},
		{Node: "node-1", Why: egress.ReasonClaim}, // node-2 had not given it back
		{Why: egress.ReasonRelease, From: "node-1"},
		{Node: "node-3", Why: egress.ReasonClaim},
	} {
		h.IP, h.Since = ip, at.Add(time.Duration(i)*time.Minute)
		put(t, c, store.HistoryKey(h), h)
	}
	for _, a := range []egress.Act{
		{What: egress.ActPin, IP: ip, Node: "node-3", By: "bob@desk", Since: at.Add(150 * time.Second)},
		{What: egress.ActUnpin, IP: ip, By: "bob@desk", Since: at.Add(time.Hour)},
		{What: egress.ActMove, IP: ip, Node: "node-2", By: "bob@desk", Since: at.Add(time.Hour)}, // the tenure says it
		{What: egress.ActPin, IP: ip.Next(), Node: "node-3", By: "bob@desk", Since: at},
		{What: egress.ActCordon, Node: "node-3", By: "bob@desk", Since: at},
	} {
		put(t, c, store.ActKey(a), a)
	}
	var out bytes.Buffer
	if err := History(t.Context(), c, ip, "", &out); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		fields := strings.Fields(line)
		got = append(got, strings.Join(append(fields[1:2], fields[3:]...), " ")) // not when, and for how long
	}
	want := []string{"NODE WHY FROM BY", "node-1 claim - -", "node-2 drain node-1 alice@laptop", "node-1 crash node-2 -", "node-3 pin - bob@desk", "- release node-1 -",
		"node-3 claim - -", "- unpin - bob@desk"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("history (-want +got):\n%s", diff)
	}
	for _, format := range []string{"json", "yaml"} {
		out.Reset()
		if err := History(t.Context(), c, ip, format, &out); err != nil || !strings.Contains(out.String(), "crash") {
			t.Errorf("as %s: %v\n%s", format, err, out.String())
		}
	}
	put(t, c, store.HistoryPrefix+ip.String()+"/x", "no JSON")
	out.Reset()
	if err := History(t.Context(), c, ip, "", &out); err == nil || !strings.Contains(err.Error(), "/x") || !strings.Contains(out.String(), "drain") {
		t.Errorf("with a broken record: %v\n%s\nwant the others, and an error that names it", err, out.String())
	}
}
