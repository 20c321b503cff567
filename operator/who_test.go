package operator

import (
	"context"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/natlog"
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
		u.ask(t.Context(), WhoConfig{Pages: [2]string{"/now", "/then"}, Ask: none}, node, nil)
		if len(u.Missing) != 1 || (len(u.Ask) == 1) != suggests {
			t.Errorf("node %q: missing %q, to paste %q", node, u.Missing, u.Ask)
		}
	}
}

func TestTheCommandToPasteAsksTheSameInTheNamespaceOfTheInstallation(t *testing.T) {
	none := func(context.Context, string, []netip.Addr, string, url.Values, any) error { return ErrNoWay }
	at := time.Date(2026, 11, 28, 12, 3, 4, 500e6, time.UTC)
	for want, cfg := range map[string]WhoConfig{
		"egret who '203.0.113.5:41012'": {Now: true, Question: natlog.Question{IP: netip.MustParseAddr("203.0.113.5"), Port: 41012}},
		"egret who '[2001:db8::5]:41012' --at 2026-11-28T12:03:04.5Z --to 2001:db8::9 --protocol 'tcp'": {
			Question:    natlog.Question{IP: netip.MustParseAddr("2001:db8::5"), Port: 41012, From: at},
			Destination: netip.MustParseAddr("2001:db8::9"), Protocol: "tcp",
		},
	} {
		var u Used
		cfg.Pages, cfg.Ask, cfg.Namespace = [2]string{"/now", "/then"}, none, "elsewhere"
		u.ask(t.Context(), cfg, "node-1", nil)
		if len(u.Ask) != 1 || !strings.HasSuffix(u.Ask[0], " -- "+want) || strings.Count(u.Ask[0], "-n elsewhere ") != 2 {
			t.Errorf("to paste %q, want %q in the namespace elsewhere", u.Ask, want)
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
