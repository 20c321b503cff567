package operator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/syncbuf"
	"github.com/egret-project/egret/store"
)

func TestWatchPrintsWhatComesChangesAndGoes(t *testing.T) {
	c := client(t)
	put(t, c, store.NodeKey("node-1"), egress.Node{Name: "node-1", Index: 1})
	ctx, cancel := context.WithCancel(t.Context())
	var out syncbuf.Buffer
	done := make(chan error, 1)
	go func() { done <- Watch(ctx, c, WatchConfig{Kind: "nodes"}, &out) }()
	wait := func(what string, n int) { t.Helper(); awaitText(t, &out, what, n) }
	wait("node-1", 1)
	put(t, c, store.NodeKey("node-2"), egress.Node{Name: "node-2", Index: 2})
	wait("node-2", 1)
	// of another record, the row of node-1 tells
	put(t, c, store.AgentKey("node-1"), egress.Agent{Node: "node-1", Version: "v9"})
	wait("v9", 1)
	put(t, c, store.CordonKey("node-2"), egress.Cordon{Node: "node-2"})
	wait("true", 1)
	del(t, c, store.NodeKey("node-2"))
	wait("deleted", 1)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if text := out.String(); strings.Count(text, "NODE ") != 1 || strings.Count(text, "node-1") != 2 || strings.Count(text, "node-2") != 3 {
		t.Errorf("want each row when it changes, and the header once:\n%s", text)
	}
	lines := strings.Split(out.String(), "\n")
	for _, line := range lines[1 : len(lines)-1] {
		if at := strings.Index(lines[0], "INDEX"); line[at-1] != ' ' || line[at] == ' ' {
			t.Errorf("%q is not below %q", line, lines[0])
		}
	}
}

// awaitText waits until a text was printed n times.
func awaitText(t *testing.T, out *syncbuf.Buffer, what string, n int) {
	t.Helper()
	for until := time.Now().Add(30 * time.Second); strings.Count(out.String(), what) < n; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%q is not there %d times:\n%s", what, n, out.String())
		}
	}
}

func TestWatchPrintsRecordsInEveryFormat(t *testing.T) {
	c := client(t)
	put(t, c, store.NodeKey("node-1"), egress.Node{Name: "node-1", Index: 1})
	type running struct {
		out  syncbuf.Buffer
		done chan error
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	watches := map[string]*running{}
	start := func(name string, cfg WatchConfig) *running {
		r := &running{done: make(chan error, 1)}
		watches[name], cfg.Kind = r, "nodes"
		go func() { r.done <- Watch(ctx, c, cfg, &r.out) }()
		return r
	}
	start("wide", WatchConfig{Format: wide, Events: true})
	start("json", WatchConfig{Format: "json"})
	start("json events", WatchConfig{Format: "json", Events: true})
	start("yaml", WatchConfig{Format: "yaml"})
	start("name", WatchConfig{Format: "name"})
	start("jsonpath", WatchConfig{Format: "jsonpath={.type} {.object.name} {.object.index}", Events: true})
	for name, r := range watches {
		for until := time.Now().Add(30 * time.Second); r.out.String() == ""; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(until) {
				t.Fatalf("%s: nothing is printed", name)
			}
		}
	}
	put(t, c, store.AgentKey("node-1"), egress.Agent{Node: "node-1", Version: "v9"}) // which changes the row, and not the record
	awaitText(t, &watches["wide"].out, "v9", 1)
	put(t, c, store.NodeKey("node-1"), egress.Node{Name: "node-1", Index: 12345})
	for _, name := range []string{"wide", "json", "json events", "yaml", "jsonpath"} {
		awaitText(t, &watches[name].out, "12345", 1)
	}
	awaitText(t, &watches["name"].out, "nodes/node-1\n", 2)
	del(t, c, store.NodeKey("node-1")) // the agent's row stays, without a record
	awaitText(t, &watches["jsonpath"].out, "DELETED", 1)
	awaitText(t, &watches["json events"].out, `"DELETED"`, 1)
	awaitText(t, &watches["wide"].out, "gone", 1)
	awaitText(t, &watches["name"].out, "nodes/node-1\n", 3)
	del(t, c, store.AgentKey("node-1"))
	awaitText(t, &watches["wide"].out, "DELETED", 1)
	awaitText(t, &watches["name"].out, "nodes/node-1\n", 4)
	cancel()
	for name, r := range watches {
		if err := <-r.done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, want := range map[string]string{
		"name":     strings.Repeat("nodes/node-1\n", 4), // it came, changed, had an agent alone, and went
		"jsonpath": "ADDED node-1 1\nMODIFIED node-1 12345\nDELETED node-1 12345\n",
	} {
		if got := watches[name].out.String(); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	var types []string
	for d := json.NewDecoder(strings.NewReader(watches["json events"].out.String())); ; {
		var e struct {
			Type   string
			Object egress.Node
		}
		if err := d.Decode(&e); err != nil {
			break
		}
		types = append(types, e.Type+" "+e.Object.Name)
	}
	if want := []string{"ADDED node-1", "MODIFIED node-1", "DELETED node-1"}; !slices.Equal(types, want) {
		t.Errorf("as JSON %q, want %q", types, want)
	}
	if n := strings.Count(watches["yaml"].out.String(), "---\n"); n != 3 {
		t.Errorf("%d documents of YAML:\n%s", n, watches["yaml"].out.String())
	}
	if text := watches["wide"].out.String(); !strings.HasPrefix(text, "EVENT ") || !strings.Contains(text, "ADDED      node-1") || !strings.Contains(text, "MODIFIED   node-1") {
		t.Errorf("a wide table with events:\n%s", text)
	}
}

func TestWatchOutlivesAnOutageOfEtcdAndSaysSo(t *testing.T) {
	server := etcdtest.New(t)
	var log syncbuf.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	c, err := store.Dial(t.Context(), store.Config{Endpoints: []string{server.Endpoint()}, Log: logger})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var out syncbuf.Buffer
	done := make(chan error, 1)
	go func() { done <- Watch(ctx, c, WatchConfig{Kind: "pins", Log: logger}, &out) }()
	awaitText(t, &out, "IP", 1)
	server.Cut()
	awaitText(t, &log, "watch of etcd lost", 1)
	server.Mend()
	putPast(t, server, store.PinKey(ip), egress.Pin{IP: ip, Node: "node-2"})
	awaitText(t, &out, "node-2", 1)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestGetPrintsNamesAndPaths(t *testing.T) {
	c := client(t)
	for _, name := range []string{"node-1", "node-2"} {
		put(t, c, store.AgentKey(name), egress.Agent{Node: name, Lease: "a1", Version: "v1"})
	}
	put(t, c, store.NodeKey("node-1"), egress.Node{Name: "node-1", Index: 1})
	put(t, c, store.EgressKey("web"), egress.Policy{Name: "web", Bandwidth: &egress.Bandwidth{Rate: 1234567, Burst: 1234567}})
	put(t, c, store.MembersByEgressKey("web", "node-1"), egress.Members{Egress: "web", Node: "node-1", Pods: []egress.Member{{Pod: "prod/web-1"}}})
	put(t, c, store.MoveKey(ip), egress.Move{IP: ip, To: "node-2", Since: time.Now()})
	for _, tt := range []struct{ kind, format, want string }{
		{"agents", "name", "agents/node-1\nagents/node-2\n"},
		{"members", "name", "members/web/node-1\n"},
		{"moves", "name", "moves/10.10.0.11\n"},
		{"agents", "jsonpath={.items[*].node}", "node-1 node-2\n"},
		{"agents", `jsonpath={range .items[?(@.node=="node-2")]}{.node}={.version}{end}`, "node-2=v1\n"},
		{"moves", "jsonpath={.items[0].to}", "node-2\n"},
		{"egresses", "jsonpath={.items[*].bandwidth.rate}", "1234567\n"}, // a whole number, and not 1.234567e+06
		{"pins", "name", ""},
		{"pins", "yaml", "[]\n"},
		{"pins", "jsonpath={.items[*].node}", "\n"},
	} {
		var out bytes.Buffer
		if err := Get(t.Context(), c, tt.kind, tt.format, &out); err != nil || out.String() != tt.want {
			t.Errorf("get %s -o %s: %q, %v; want %q", tt.kind, tt.format, out.String(), err, tt.want)
		}
	}
	for kind, want := range map[string][]string{"agents": {"node-1", "v1", "a1"}, "members": {"web", "node-1", "1"}, "moves": {"10.10.0.11", "node-2", "move", "false"}} {
		var out bytes.Buffer
		err := Get(t.Context(), c, kind, "", &out)
		for _, text := range want {
			if err != nil || !strings.Contains(out.String(), text) {
				t.Errorf("get %s: %v; %q is not in\n%s", kind, err, text, out.String())
			}
		}
	}
}

func TestGetPrintsFurtherColumns(t *testing.T) {
	w := whole()
	w.Agents["node-1"] = egress.Agent{Node: "node-1", MAC: "02:e9:00:00:00:01", Permit: egress.Duration(500 * time.Millisecond), Features: []string{"vlan"}, Faults: map[string]string{"routes": "EPERM"}}
	w.Moves = map[netip.Addr]egress.Move{ip: {IP: ip, To: "node-2", By: "bob@desk"}}
	p := w.Pools["pool"]
	p.Subnet = &egress.Subnet{Gateway: netip.MustParseAddr("10.10.0.1"), PrefixLength: 24, VLAN: 100}
	w.Pools["pool"] = p
	delete(w.Nodes, "node-2") // its row is there by its agent
	for kind, want := range map[string]string{
		"agents":      "02:e9:00:00:00:01 500ms vlan",
		"allocations": "node-1",
		"egresses":    "1 - -",
		"members":     "prod/web-1",
		"moves":       "bob@desk",
		"nodes":       "10.244.0.0/24 routes",
		"owners":      "- web",
		"pools":       "10.10.0.1/24 100 1",
	} {
		l := list(kind, w.Everything, time.Now())
		var narrow, out bytes.Buffer
		if err := errors.Join(l.write("", &narrow), l.write(wide, &out)); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if row := strings.Join(strings.Fields(lines[1]), " "); !strings.HasSuffix(row, " "+want) {
			t.Errorf("%s: %q, want %q at its end", kind, row, want)
		}
		for i, line := range strings.Split(strings.TrimSpace(narrow.String()), "\n") {
			if has := strings.Join(strings.Fields(lines[i]), " "); !strings.HasPrefix(has, strings.Join(strings.Fields(line), " ")) {
				t.Errorf("%s: %q does not begin as the narrow %q", kind, lines[i], line)
			}
		}
		if columns := len(strings.Fields(l.header)) + len(strings.Fields(l.moreHeader)); len(l.more) != len(l.rows) || columns != len(l.rows[0])+len(l.more[0]) {
			t.Errorf("%s: %d columns in the header, %d in a row, further ones in %d of %d rows", kind, columns, len(l.rows[0])+len(l.more[0]), len(l.more), len(l.rows))
		}
	}
	c := client(t)
	put(t, c, store.PinKey(ip), egress.Pin{IP: ip, Node: "node-1"})
	put(t, c, store.BlockKey(ip, 2048), egress.Block{IP: ip, First: 2048, Size: 1024, Node: "node-1"})
	for _, kind := range Kinds { // those without further columns, too
		if err := Get(t.Context(), c, kind, wide, io.Discard); err != nil {
			t.Errorf("get %s -o wide: %v", kind, err)
		}
	}
}
