package operator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
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
		u.ask(t.Context(), WhoConfig{Pages: [2]string{"/now", "/then"}, Ask: none, Namespace: "egret-system"}, node, nil)
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
			Question: natlog.Question{IP: netip.MustParseAddr("2001:db8::5"), Port: 41012, From: at, Destination: netip.MustParseAddr("2001:db8::9"), Protocol: "tcp"},
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

// A gateway that translates for another node knows no pod: who asks that node, and does not take the gateway's line for
// the answer.
func TestThePodOfAnotherNodeIsNamedByItsNode(t *testing.T) {
	to := netip.MustParseAddr("192.0.2.1")
	line := natlog.Line{EgressIP: ip, OverlayIP: netip.MustParseAddr("0.5.0.7"), OverlayPort: 1000, Protocol: "tcp", DestinationIP: to, DestinationPort: 443}
	ofGateway := func(port uint16) natlog.Line {
		l := line
		l.Node, l.PodNode, l.Port, l.OverlayPort = "gw", "n1", 1024, port
		return l
	}
	ofPod := line
	ofPod.Node, ofPod.PodNamespace, ofPod.PodName, ofPod.PodIP, ofPod.PodPort = "n1", "prod", "web-1", netip.MustParseAddr("10.244.0.1"), 39312
	elsewhere := ofPod
	elsewhere.DestinationPort = 444
	var many []natlog.Line
	for i := range 2 * maxAsked {
		many = append(many, ofGateway(uint16(2000+i)))
	}
	one := []natlog.Line{ofGateway(1000)}
	for name, tt := range map[string]struct {
		uses   []natlog.Line
		there  []natlog.Line // what the agent of the pod's node knows
		err    error
		status int
		asked  int
		want   []string
	}{
		"its node is asked":                       {one, []natlog.Line{ofPod}, nil, 0, 1, []string{"prod/web-1", "10.244.0.1:39312", "gw"}},
		"two connections by one port between":     {append(one, one...), []natlog.Line{ofPod}, nil, 0, 1, []string{"prod/web-1"}},
		"its node is not reached":                 {one, nil, ErrNoWay, 1, 1, []string{"of node n1, as 0.5.0.7:1000", "spec.nodeName=n1) -- egret who '0.5.0.7:1000'"}},
		"an older agent, which knows no such one": {one, nil, nil, 1, 1, []string{"not known: which pod of node n1 had 0.5.0.7:1000 toward 192.0.2.1:443"}},
		"another connection by that port":         {one, []natlog.Line{elsewhere}, nil, 1, 1, []string{"which pod of node n1 had"}},
		"one of two":                              {append(one, ofGateway(1001)), []natlog.Line{ofPod}, nil, 1, 2, []string{"prod/web-1", "of node n1, as 0.5.0.7:1001"}},
		"a pod of the gateway's node":             {[]natlog.Line{ofPod}, nil, nil, 0, 0, []string{"prod/web-1"}},
		"more than anybody is asked for":          {many, nil, nil, 1, maxAsked, []string{"no more than 16 pods of other nodes"}},
	} {
		asked := 0
		cfg := WhoConfig{Question: natlog.Question{IP: ip, Port: 1024}, Now: true, Pages: [2]string{"/now", "/then"}, Namespace: "egret-system",
			Ask: func(_ context.Context, node string, _ []netip.Addr, page string, q url.Values, reply any) error {
				if asked++; node != "n1" || page != "/now" || q.Get("ip") != "0.5.0.7" {
					t.Errorf("%s: asked node %s at %s: %v", name, node, page, q)
				}
				for _, l := range tt.there {
					if q.Get("port") == fmt.Sprint(l.OverlayPort) {
						reply.(*natlog.Reply).Uses = append(reply.(*natlog.Reply).Uses, l)
					}
				}
				return tt.err
			}}
		u := Used{IP: ip, Port: 1024, Uses: slices.Clone(tt.uses)}
		u.askPodNodes(t.Context(), cfg, map[string]egress.Node{"n1": {Name: "n1"}})
		var out strings.Builder
		err := u.answer(cfg, &out)
		var v Verdict
		if errors.As(err, &v); v.Status != tt.status {
			t.Errorf("%s: %v, want status %d\n%s", name, err, tt.status, out.String())
		}
		for _, want := range tt.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s: want %q in\n%s", name, want, out.String())
			}
		}
		if asked != tt.asked {
			t.Errorf("%s: asked %d times, want %d", name, asked, tt.asked)
		}
	}
}

// What the pod's node is in doubt of is so of the answer, too.
func TestADoubtOfThePodsNodeIsTold(t *testing.T) {
	of := natlog.Line{Protocol: "tcp", DestinationIP: netip.MustParseAddr("192.0.2.1"), DestinationPort: 443}
	ofGateway, first, second := of, of, of
	ofGateway.Node, ofGateway.PodNode, ofGateway.OverlayIP, ofGateway.OverlayPort = "gw", "n1", netip.MustParseAddr("0.5.0.7"), 1000
	first.PodNamespace, first.PodName = "prod", "web-1"
	second.PodNamespace, second.PodName = "prod", "web-2"
	for name, tt := range map[string]struct {
		there natlog.Answer
		want  []string
	}{
		"none":                             {natlog.Answer{Uses: []natlog.Line{first}}, []string{"prod/web-1"}},
		"it heard of the connection later": {natlog.Answer{Uses: []natlog.Line{first}, Late: true}, []string{"prod/web-1", "half a second later"}},
		"two pods had the port in the second that was asked for": {
			natlog.Answer{Uses: []natlog.Line{first, second}}, []string{"prod/web-1", "prod/web-2"}},
	} {
		cfg := WhoConfig{Question: natlog.Question{IP: ip, Port: 1024}, Pages: [2]string{"/now", "/then"},
			Ask: func(_ context.Context, _ string, _ []netip.Addr, _ string, _ url.Values, reply any) error {
				reply.(*natlog.Reply).Answer = tt.there
				return nil
			}}
		u := Used{IP: ip, Port: 1024, Uses: []natlog.Line{ofGateway}}
		u.askPodNodes(t.Context(), cfg, nil)
		var out strings.Builder
		if err := u.answer(cfg, &out); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, want := range []string{"prod/web-1", "prod/web-2", "half a second later"} {
			if strings.Contains(out.String(), want) != slices.Contains(tt.want, want) {
				t.Errorf("%s: want %q alone in\n%s", name, tt.want, out.String())
			}
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
		if out.Reset(); text == "" && err == nil && !strings.HasSuffix(what, " -o name") || strings.ContainsAny(text, "\x1b\x07\r") {
			t.Errorf("%s: %v, %q", what, err, text)
		}
	}
	for _, kind := range Kinds {
		for _, format := range []string{"", wide, "json", "yaml", "name", "jsonpath={.items[*].node}"} {
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
