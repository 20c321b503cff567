package operator

import (
	"context"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

// An attempt: a node that was taken over writes a record with a name that a shell would run where the operator pastes
// what the command suggests.
func TestTheCommandToPasteNamesNodesAlone(t *testing.T) {
	none := func(context.Context, string, []netip.Addr, string, url.Values, any) error { return ErrNoWay }
	for node, suggests := range map[string]bool{
		"node-1.example.org": true, "node-1 $(touch /tmp/x)": false, "node-1;reboot": false, "-o=x": false, "`id`": false, "node-1\nreboot": false,
	} {
		var u Used
		u.ask(t.Context(), WhoConfig{Pages: [2]string{"/now", "/then"}, Again: []string{"egret", "who"}, Ask: none}, node, nil)
		if len(u.Missing) != 1 || (len(u.Ask) == 1) != suggests {
			t.Errorf("node %q: missing %q, to paste %q", node, u.Missing, u.Ask)
		}
	}
}

// A person who looks at what a node wrote gets it as text, whichever command shows it.
func TestWhatANodeWroteCommandsNoTerminal(t *testing.T) {
	server := etcdtest.New(t)
	c := clientOf(t, server)
	const evil = "\x1b]0;evil\x07\x1b[2J\r"
	put(t, c, store.AgentKey("node-1"), egress.Agent{Node: "node-1", Version: evil, Lease: evil, MAC: evil, Features: []string{evil},
		Faults: map[string]string{evil: evil}, Dropped: map[netip.Addr]string{ip: evil}, Conflicts: map[netip.Addr]string{ip: evil}, Refused: map[string]string{"pool": evil}})
	put(t, c, store.NodeKey("node-1"), egress.Node{Name: "node-1", Index: 1})
	put(t, c, store.EgressKey("web"), egress.Policy{Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}})
	put(t, c, store.OwnerKey(ip), egress.Owner{IP: ip, Node: "node-1" + evil, From: evil, Why: evil})
	put(t, c, store.MembersByEgressKey("web", "node-1"), egress.Members{Egress: "web", Node: "node-1", Pods: []egress.Member{{Pod: "prod/web" + evil}}})
	put(t, c, store.AgentKey("node-2"), evil)
	var out strings.Builder
	shown := func(what string, err error) {
		t.Helper()
		text := out.String()
		if out.Reset(); text == "" && err == nil || strings.ContainsAny(text, "\x1b\x07\r") {
			t.Errorf("%s: %v, %q", what, err, text)
		}
	}
	for _, kind := range Kinds {
		for _, format := range []string{"", wide, "json", "yaml"} {
			shown("get "+kind+" -o "+format, Get(t.Context(), c, kind, format, &out))
		}
	}
	for _, format := range []string{"", "json", "yaml"} {
		shown("status -o "+format, Status(t.Context(), c, format, &out))
	}
	for kind, name := range map[string]string{"node": "node-1", "egress": "web", "ip": ip.String()} {
		shown("describe "+kind, Describe(t.Context(), c, kind, name, &out))
	}
	shown("history", History(t.Context(), c, ip, "", &out))
}
