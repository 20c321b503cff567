package operator

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/syncbuf"
	"github.com/egret-project/egret/store"
)

func TestWatchPrintsWhatComesChangesAndGoes(t *testing.T) {
	c := client(t)
	put(t, c, store.NodeKey("node-1"), egress.Node{Name: "node-1", Index: 1})
	ctx, cancel := context.WithCancel(t.Context())
	var out syncbuf.Buffer
	done := make(chan error, 1)
	go func() { done <- Watch(ctx, c, "nodes", &out) }()
	wait := func(what string, n int) {
		t.Helper()
		for until := time.Now().Add(20 * time.Second); strings.Count(out.String(), what) < n; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(until) {
				t.Fatalf("%q is not there %d times:\n%s", what, n, out.String())
			}
		}
	}
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
}

func TestGetPrintsNamesAndPaths(t *testing.T) {
	c := client(t)
	for _, name := range []string{"node-1", "node-2"} {
		put(t, c, store.AgentKey(name), egress.Agent{Node: name, Lease: "a1", Version: "v1"})
	}
	put(t, c, store.MembersByEgressKey("web", "node-1"), egress.Members{Egress: "web", Node: "node-1", Pods: []egress.Member{{Pod: "prod/web-1"}}})
	put(t, c, store.MoveKey(ip), egress.Move{IP: ip, To: "node-2", Since: time.Now()})
	for _, tt := range []struct{ kind, format, want string }{
		{"agents", "name", "agents/node-1\nagents/node-2\n"},
		{"members", "name", "members/web/node-1\n"},
		{"moves", "name", "moves/10.10.0.11\n"},
		{"agents", "jsonpath={.items[*].node}", "node-1 node-2\n"},
		{"agents", `jsonpath={range .items[?(@.node=="node-2")]}{.node}={.version}{end}`, "node-2=v1\n"},
		{"moves", "jsonpath={.items[0].to}", "node-2\n"},
		{"pins", "name", ""},
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
