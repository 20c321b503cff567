package operator

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

var podIP = netip.MustParseAddr("10.244.1.5")

// whole returns a cluster in which all is well: node-1 holds the IP of web, and node-2 has its pod prod/web-1.
// prod/db-1 is of no egress.
func whole() store.Whole {
	s := snapshot()
	s.Egresses["web"] = egress.Policy{Name: "web", Created: time.Now(), Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}}
	s.Pools["pool"] = egress.Pool{Name: "pool", Ranges: []egress.Range{{Start: ip, End: ip.Next()}}}
	s.Nodes = map[string]egress.Node{
		"node-1": {Name: "node-1", Index: 1, Addresses: []netip.Addr{netip.MustParseAddr("10.10.0.101")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24")}},
		"node-2": {Name: "node-2", Index: 2, Addresses: []netip.Addr{netip.MustParseAddr("10.10.0.102")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}},
	}
	s.Agents = map[string]egress.Agent{"node-1": {Node: "node-1", Lease: egress.FormatLease(0xa1), Version: "v1"}, "node-2": {Node: "node-2", Lease: egress.FormatLease(0xa2), Version: "v1"}}
	s.Owners[ip] = egress.Owner{IP: ip, Node: "node-1", Lease: 0xa1, Revision: 7, Since: time.Now(), Why: egress.ReasonClaim}
	s.Services = map[string]egress.ServiceCIDR{"kubernetes": {Name: "kubernetes", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}}}
	block := egress.Block{IP: ip, First: 2048, Size: 1024, Node: "node-2", Since: time.Now()}
	s.ByEgress = map[string]map[string]egress.Members{"web": {"node-2": {
		Egress: "web", Node: "node-2", Pods: []egress.Member{{Pod: "prod/web-1", IPs: []netip.Addr{podIP}}}, Blocks: []egress.Block{block},
	}}}
	return store.Whole{
		Everything: store.Everything{Snapshot: *s, Allocations: []egress.Allocation{{IP: ip, Pool: "pool", ID: 1, Egresses: []string{"web"}}}},
		Unselected: map[string]egress.Members{"node-2": {Egress: "-", Node: "node-2", Pods: []egress.Member{{Pod: "prod/db-1", IPs: []netip.Addr{podIP.Next()}}}}},
		Blocks:     []egress.Block{block}, Leader: "crdsync-1",
	}
}

func agent(w store.Whole, node string, change func(*egress.Agent)) {
	a := w.Agents[node]
	change(&a)
	w.Agents[node] = a
}

// Deliberate faults, as etcd shows them. Each is named, and each verdict is the right one.
func TestTraceNamesWhatIsInTheWay(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(w *store.Whole, q *Question)
		status int
		want   string // in the verdict
	}{
		"nothing": {func(*store.Whole, *Question) {}, 0, "gets through, as 10.10.0.11 by gateway node-1."},
		"its own node is the gateway": {func(w *store.Whole, _ *Question) {
			w.Owners[ip] = egress.Owner{IP: ip, Node: "node-2", Lease: 0xa2}
		}, 0, "as 10.10.0.11 by its own node node-2."},
		"to the outside":       {func(_ *store.Whole, q *Question) { q.To = netip.MustParseAddr("203.0.113.9") }, 0, "gets through"},
		"to another pod":       {func(_ *store.Whole, q *Question) { q.To = netip.MustParseAddr("10.244.0.7") }, 0, "of the pods of node node-1"},
		"to a service":         {func(_ *store.Whole, q *Question) { q.To = netip.MustParseAddr("10.96.0.1") }, 0, "ServiceCIDR kubernetes"},
		"to a node":            {func(_ *store.Whole, q *Question) { q.To = netip.MustParseAddr("10.10.0.101") }, 0, "an address of node node-1"},
		"to the other family":  {func(_ *store.Whole, q *Question) { q.To = netip.MustParseAddr("2001:db8::1") }, 2, "no address of the family of 2001:db8::1"},
		"no egress selects it": {func(_ *store.Whole, q *Question) { q.Pod = "prod/db-1" }, 0, "no egress selects it"},
		"the egress has no address": {func(w *store.Whole, _ *Question) {
			w.Egresses["web"] = egress.Policy{Name: "web"}
		}, 2, "no address of the family"},
		"the egress is gone":              {func(w *store.Whole, _ *Question) { delete(w.Egresses, "web") }, 2, "egress web is gone"},
		"nobody holds it, somebody could": {func(w *store.Whole, _ *Question) { delete(w.Owners, ip) }, 2, "no node holds 10.10.0.11 yet: 2 nodes could"},
		"nobody holds it, as another host has it": {func(w *store.Whole, _ *Question) {
			delete(w.Owners, ip)
			agent(*w, "node-1", func(a *egress.Agent) { a.Conflicts = map[netip.Addr]string{ip: "02:00:00:00:00:09 on link eth0"} })
		}, 2, "no node holds 10.10.0.11: another host uses it, 02:00:00:00:00:09 on link eth0 of node node-1."},
		"nobody can hold it: cordoned, and dead": {func(w *store.Whole, _ *Question) {
			delete(w.Owners, ip)
			w.Cordons["node-1"] = egress.Cordon{Node: "node-1"}
			delete(w.Agents, "node-2")
		}, 2, "without a live agent: node-2; cordoned: node-1"},
		"nobody can hold it: full": {func(w *store.Whole, _ *Question) {
			delete(w.Owners, ip)
			w.Egresses["api"] = egress.Policy{Name: "api", Addresses: []egress.Address{{IP: ip.Next(), ID: 2, Pool: "pool"}}}
			w.Owners[ip.Next()] = egress.Owner{IP: ip.Next(), Node: "node-1", Lease: 0xa1}
			n := w.Nodes["node-1"]
			n.Capacity = 1
			w.Nodes["node-1"] = n
			delete(w.Agents, "node-2")
		}, 2, "without room, see egret get nodes: node-1"},
		"the pool selects no node": {func(w *store.Whole, _ *Question) {
			delete(w.Owners, ip)
			w.Pools["pool"] = egress.Pool{Name: "pool", NodeSelector: egress.Selector{MatchLabels: map[string]string{"egress": "yes"}}}
		}, 2, "pool pool selects no node"},
		"the pool is gone": {func(w *store.Whole, _ *Question) { delete(w.Owners, ip); delete(w.Pools, "pool") }, 2, "pool pool does not exist"},
		"a static IP is on no link": {func(w *store.Whole, _ *Question) {
			delete(w.Owners, ip)
			w.Egresses["web"] = egress.Policy{Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1}}}
		}, 2, "no node with a live agent has 10.10.0.11 on an interface"},
		"the gateway's agent is dead": {func(w *store.Whole, _ *Question) { delete(w.Agents, "node-1") }, 2, "node-1 has the lock of 10.10.0.11, and its agent is down"},
		"a lock of a former agent":    {func(w *store.Whole, _ *Question) { agent(*w, "node-1", func(a *egress.Agent) { a.Lease = "b1" }) }, 2, "under lease 00000000000000a1 of a former agent"},
		"the gateway restarts":        {func(w *store.Whole, _ *Question) { agent(*w, "node-1", func(a *egress.Agent) { a.Restarting = true }) }, 3, "being restarted"},
		"the gateway's node is gone":  {func(w *store.Whole, _ *Question) { delete(w.Nodes, "node-1") }, 2, "there is no such node"},
		"the pod's node is gone":      {func(w *store.Whole, _ *Question) { delete(w.Nodes, "node-2") }, 2, "node node-2 has no record"},
		"the pod's node has no agent": {func(w *store.Whole, _ *Question) { delete(w.Agents, "node-2") }, 3, "the agent of node-2 is down"},
		"another host uses the IP": {func(w *store.Whole, _ *Question) {
			agent(*w, "node-1", func(a *egress.Agent) { a.Conflicts = map[netip.Addr]string{ip: "02:00:00:00:00:09 on eth0"} })
		}, 3, "02:00:00:00:00:09 on eth0"},
		"another NAT is first": {func(w *store.Whole, _ *Question) {
			agent(*w, "node-2", func(a *egress.Agent) { a.Dropped = map[netip.Addr]string{ip: "chain ip nat post comes first"} })
		}, 2, "node-2 drops it: chain ip nat post comes first"},
		"another NAT at the gateway": {func(w *store.Whole, _ *Question) {
			agent(*w, "node-1", func(a *egress.Agent) { a.Dropped = map[netip.Addr]string{ip: "chain ip nat post comes first"} })
		}, 2, "node-1 drops it"},
		"the pod's node cannot program": {func(w *store.Whole, _ *Question) {
			agent(*w, "node-2", func(a *egress.Agent) { a.Faults = map[string]string{"nftables": "EPERM"} })
		}, 3, "node-2 cannot program its nftables: EPERM"},
		"the VLAN is another's": {func(w *store.Whole, _ *Question) {
			p := w.Pools["pool"]
			p.Subnet = &egress.Subnet{Gateway: netip.MustParseAddr("10.10.0.1"), PrefixLength: 24, VLAN: 100}
			w.Pools["pool"] = p
			agent(*w, "node-1", func(a *egress.Agent) { a.Refused = map[string]string{"pool": "VLAN 100 is eth0.100's"} })
		}, 2, "node-1 cannot serve pool pool: VLAN 100 is eth0.100's"},
		"no ports are left": {func(w *store.Whole, _ *Question) {
			m := w.ByEgress["web"]["node-2"]
			m.Blocks = nil
			w.ByEgress["web"]["node-2"] = m
		}, 3, "node-2 has no ports of 10.10.0.11 of its own"},
		"ports run out": {func(w *store.Whole, _ *Question) {
			agent(*w, "node-2", func(a *egress.Agent) { a.Ports = map[netip.Addr]egress.PortUse{ip: {Want: 4096}} })
		}, 3, "asks for 4096 ports of 10.10.0.11 and has 1024"},
		"a node without an index": {func(w *store.Whole, _ *Question) {
			n := w.Nodes["node-1"]
			n.Index = 0
			w.Nodes["node-1"] = n
		}, 2, "has no index"},
	} {
		t.Run(name, func(t *testing.T) {
			w, q := whole(), Question{Pod: "prod/web-1"}
			tt.change(&w, &q)
			steps, err := trace(w, q, time.Now(), nil)
			if err != nil {
				t.Fatal(err)
			}
			text, status := conclude(steps)
			if status != tt.status || !strings.Contains(text, tt.want) {
				t.Errorf("verdict %d %q, want %d and %q; the steps:\n%v", status, text, tt.status, tt.want, steps)
			}
		})
	}
}

// Where the protocol, or the port, makes another answer.
func TestTraceGoesByProtocolAndPort(t *testing.T) {
	other := ip.Next()
	outside, node := netip.MustParseAddr("198.51.100.9"), netip.MustParseAddr("10.10.0.101")
	used := func(n int) *int { return &n }
	for name, tt := range map[string]struct {
		q      Question
		change func(w *store.Whole, home *egress.Kernel)
		status int
		want   string // in the verdict
		step   string // in a step
	}{
		"younger egresses": {Question{To: outside}, func(w *store.Whole, _ *egress.Kernel) {
			w.ByEgress["web"]["node-2"].Pods[0].Also = []string{"all", "prod"}
		}, 0, "gets through", "selected by egress web; selected by all, prod too: the oldest applies"},
		"TCP":      {Question{To: outside, Protocol: "tcp", Port: 443}, nil, 0, "gets through", "198.51.100.9 port 443 (tcp) is outside"},
		"echoes":   {Question{To: outside, Protocol: "icmp"}, nil, 0, "gets through", "to 10.10.0.11 and identifiers of echo requests 2048-3071"},
		"SCTP":     {Question{To: outside, Protocol: "sctp", Port: 2905}, nil, 0, "gets through", "to 10.10.0.11 and ports 2048-3071"},
		"GRE":      {Question{Protocol: "gre"}, nil, 0, "gets through", "on node-2, to an address of node-2 for the overlay, and at the gateway to 10.10.0.11: gre has no ports, so it is by conntrack there"},
		"a number": {Question{Protocol: "253"}, nil, 0, "gets through", "protocol 253 has no ports"},
		"GRE, of the gateway's own pods": {Question{Protocol: "gre"}, func(w *store.Whole, h *egress.Kernel) {
			w.Owners[ip] = egress.Owner{IP: ip, Node: "node-2", Lease: 0xa2}
			h.Gateway, h.Permit, h.Answers = 0, 1, true
		}, 0, "by its own node node-2", "on node-2, to 10.10.0.11: gre has no ports"},
		"what has no ports lacks none": {Question{Protocol: "esp"}, func(w *store.Whole, _ *egress.Kernel) {
			m := w.ByEgress["web"]["node-2"]
			m.Blocks = nil
			w.ByEgress["web"]["node-2"] = m
		}, 0, "gets through", "esp has no ports"},
		"what has ports does": {Question{Protocol: "tcp"}, func(w *store.Whole, _ *egress.Kernel) {
			m := w.ByEgress["web"]["node-2"]
			m.Blocks = nil
			w.ByEgress["web"]["node-2"] = m
		}, 3, "node-2 has no ports of 10.10.0.11 of its own", ""},
		"all ports are in use to another destination": {Question{To: outside, Protocol: "tcp", Port: 443}, func(_ *store.Whole, h *egress.Kernel) {
			h.PortsUsed, h.UsedTo = 1024, used(3)
		}, 0, "gets through", "3 of 1024 ports in use to 198.51.100.9 port 443 (tcp)"},
		"all ports are in use to this one": {Question{To: outside, Protocol: "tcp", Port: 443}, func(_ *store.Whole, h *egress.Kernel) {
			h.PortsUsed, h.UsedTo = 7, used(1024)
		}, 3, "all 1024 ports that node-2 has of 10.10.0.11 are in use to 198.51.100.9 port 443 (tcp): new connections there fail", ""},
		"all ports are in use to one, which may be this": {Question{To: outside, Protocol: "tcp", Port: 443}, func(_ *store.Whole, h *egress.Kernel) {
			h.PortsUsed = 1024 // an agent of an older version
		}, 3, "in use to one destination", ""},
		"what the agent's flags except": {Question{To: outside, Protocol: "tcp", Port: 443}, func(w *store.Whole, h *egress.Kernel) {
			h.Excepted = netip.MustParsePrefix("198.51.100.0/24")
			delete(w.Owners, ip) // of which it is no matter that nobody has the egress IP
		}, 0, "It leaves as if there were no egress, with the address that the CNI gives to it: 198.51.100.9 port 443 (tcp) is in 198.51.100.0/24, " +
			"to which no egress applies on node-2 (--egress.exceptCIDRs or --cluster-cidrs of its agent).", ""},
		"all ports are in use, of which GRE takes none": {Question{To: outside, Protocol: "gre"}, func(_ *store.Whole, h *egress.Kernel) { h.PortsUsed = 1024 }, 0, "gets through", ""},
		"the overlay's port of a node":                  {Question{To: node, Protocol: "udp", Port: 8479}, nil, 2, "UDP port 8479 of 10.10.0.101, an address of node node-1, is the overlay's", ""},
		"that port of TCP":                              {Question{To: node, Protocol: "tcp", Port: 8479}, nil, 0, "an address of node node-1, to which no egress applies", ""},
		"another port of a node":                        {Question{To: node, Protocol: "udp", Port: 53}, nil, 0, "10.10.0.101 port 53 (udp) is an address of node node-1", ""},
		"that port outside":                             {Question{To: outside, Protocol: "udp", Port: 8479}, nil, 0, "gets through", "is outside"},
		"an egress IP":                                  {Question{To: other}, nil, 3, "10.10.0.12 is an egress IP, of api: nodes drop what is sent there but echo requests (ping), and those of a pod may not", ""},
		"a service at an egress IP":                     {Question{To: other, Protocol: "tcp", Port: 443}, nil, 2, "does not get through: 10.10.0.12 is an egress IP, of api", ""},
		"a ping of an egress IP":                        {Question{To: other, Protocol: "icmp"}, nil, 3, "those of a pod may not get there either", ""},
		"an egress IP that is a node's own": {Question{To: other, Protocol: "tcp", Port: 443}, func(w *store.Whole, _ *egress.Kernel) {
			w.Egresses["api"] = egress.Policy{Name: "api", Addresses: []egress.Address{{IP: other, ID: 2}}}
		}, 0, "gets through", "is outside"},
	} {
		t.Run(name, func(t *testing.T) {
			w := whole()
			w.Egresses["api"] = egress.Policy{Name: "api", Addresses: []egress.Address{{IP: other, ID: 2, Pool: "pool"}}}
			home := egress.Kernel{Node: "node-2", Watching: true, PodID: 1, Steered: true, Gateway: 1, First: 2048, Ports: 1024, Guarded: -1}
			gateway := egress.Kernel{Node: "node-1", Watching: true, Permit: 0.4, Answers: true, Guarded: -1}
			if tt.change != nil {
				tt.change(&w, &home)
			}
			tt.q.Pod = "prod/web-1"
			steps, err := trace(w, tt.q, time.Now(), func(_ store.Whole, q egress.KernelQuestion, _, _ string) kernels {
				if n, _ := egress.Protocol(tt.q.Protocol, ip); tt.q.Protocol != "" && q.Protocol != n || q.Port != tt.q.Port || q.To != tt.q.To {
					t.Errorf("agents were asked %+v", q)
				}
				return kernels{said: map[string]egress.Kernel{"node-1": gateway, "node-2": home}}
			})
			if err != nil {
				t.Fatal(err)
			}
			text, status := conclude(steps)
			var all strings.Builder
			for _, s := range steps {
				all.WriteString(s.What + ": " + s.Text + "\n")
			}
			if status != tt.status || !strings.Contains(text, tt.want) || !strings.Contains(all.String(), tt.step) {
				t.Errorf("verdict %d %q, want %d and %q, and a step with %q:\n%s", status, text, tt.status, tt.want, tt.step, all.String())
			}
		})
	}
	if _, err := trace(whole(), Question{Pod: "prod/web-1", Protocol: "http"}, time.Now(), nil); err == nil || !strings.Contains(err.Error(), `"http"`) {
		t.Errorf("a protocol that there is not: %v", err)
	}
}

func TestTraceToAnAddressThatIsOfNoHostOutsideIsRefused(t *testing.T) {
	for to, refused := range map[string]bool{
		"198.51.100.9": false, "10.244.0.7": false, "2001:db8::9": false, "fd10::9": false,
		"127.0.0.1": true, "0.0.0.0": true, "169.254.169.254": true, "224.0.0.1": true, "255.255.255.255": true,
		"::": true, "::1": true, "fe80::1": true, "fe80::1%eth0": true, "ff02::1": true, "2001:db8::9%eth0": true,
	} {
		q := Question{To: netip.MustParseAddr(to)}
		err := q.Of("", 0)
		if (err != nil) != refused || err != nil && !strings.HasPrefix(err.Error(), "to "+to+": want a global unicast address") {
			t.Errorf("%s: %v", to, err)
		}
	}
	if err := (&Question{}).Of("tcp", 0); err != nil {
		t.Errorf("to anywhere: %v", err)
	}
}

func TestTraceSaysThatAFullEtcdKeepsNodesFromAnIP(t *testing.T) {
	w := whole()
	trace := func() []Step {
		t.Helper()
		steps, err := trace(w, Question{Pod: "prod/web-1"}, time.Now(), nil)
		if err != nil {
			t.Fatal(err)
		}
		noSpace(steps)
		return steps
	}
	if text, status := conclude(trace()); status != 0 || strings.Contains(text, "NOSPACE") {
		t.Errorf("of an IP that a node holds: %d %q", status, text)
	}
	delete(w.Owners, ip)
	const want = "no node holds 10.10.0.11 yet: 2 nodes could; etcd is full (NOSPACE), and none can take it until there is room"
	if text, status := conclude(trace()); status != 2 || !strings.Contains(text, want) {
		t.Errorf("%d %q, want %q", status, text, want)
	}
}

func TestTraceOfAPodThatIsNotThereSaysWhatItMayBe(t *testing.T) {
	_, err := trace(whole(), Question{Pod: "prod/web-9"}, time.Now(), nil)
	if err == nil || !strings.Contains(err.Error(), "prod/web-9") || !strings.Contains(err.Error(), "egret status") {
		t.Errorf("error %v", err)
	}
}

// A pod of a StatefulSet that changes its node is listed by both for a moment, with an address on each.
func TestTraceOfAPodThatChangesItsNodeAsksEachNodeForItsOwnAddress(t *testing.T) {
	w, there := whole(), netip.MustParseAddr("10.244.0.9")
	w.ByEgress["web"]["node-1"] = egress.Members{Egress: "web", Node: "node-1", Pods: []egress.Member{{Pod: "prod/web-1", IPs: []netip.Addr{there}}}}
	steps, err := trace(w, Question{Pod: "prod/web-1"}, time.Now(), func(_ store.Whole, q egress.KernelQuestion, home, gateway string) kernels {
		if want := map[netip.Addr]string{podIP: "node-2", there: "node-1"}[q.Pod]; home != want {
			t.Errorf("%s was asked for %s, which is on %s", home, q.Pod, want)
		}
		k := egress.Kernel{Node: home, Watching: true, PodID: 1, Steered: true, Guarded: -1}
		if home != gateway {
			k.Gateway = 1
		}
		said := map[string]egress.Kernel{home: k}
		k = said[gateway]
		k.Watching, k.Permit, k.Answers, k.Guarded = true, 0.4, true, -1
		said[gateway] = k
		return kernels{said: said}
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := "prod/web-1 with 10.244.0.9 on node-1 and 10.244.1.5 on node-2"; steps[0].Text != want {
		t.Errorf("%q, want %q", steps[0].Text, want)
	}
	var left []string
	for _, s := range steps {
		if s.What == "leaves" {
			left = append(left, s.Text)
		}
	}
	if want := []string{"as 10.10.0.11 by its own node node-1", "as 10.10.0.11 by gateway node-1"}; !slices.Equal(left, want) {
		t.Errorf("it leaves %q, want %q", left, want)
	}
	if text, status := conclude(steps); status == 2 {
		t.Errorf("verdict %d %q", status, text)
	}
}

// A pod of two families goes two ways, each with a verdict; the one asked for is told alone.
func TestTraceHasEachFamily(t *testing.T) {
	six, pod6 := netip.MustParseAddr("fd10::11"), netip.MustParseAddr("fd44::5")
	four, other := netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8::9")
	for name, tt := range map[string]struct {
		change func(w *store.Whole)
		to     netip.Addr
		status int
		want   string
	}{
		"both": {nil, netip.Addr{}, 0, "IPv4: As far as etcd tells it gets through, as 10.10.0.11 by gateway node-1. " +
			"IPv6: As far as etcd tells it gets through, as fd10::11 by its own node node-2."},
		"to IPv4": {nil, four, 0, "As far as etcd tells it gets through, as 10.10.0.11 by gateway node-1."},
		"to IPv6": {nil, other, 0, "As far as etcd tells it gets through, as fd10::11 by its own node node-2."},
		"nobody has the one": {func(w *store.Whole) { delete(w.Owners, six) }, netip.Addr{}, 2,
			"IPv4: As far as etcd tells it gets through, as 10.10.0.11 by gateway node-1. IPv6: It does not get through: no node with a live agent has fd10::11"},
		"which is not asked for": {func(w *store.Whole) { delete(w.Owners, six) }, four, 0, "As far as etcd tells it gets through, as 10.10.0.11"},
		"nobody has the other, and the one is in doubt": {func(w *store.Whole) {
			delete(w.Owners, ip)
			agent(*w, "node-2", func(a *egress.Agent) { a.Conflicts = map[netip.Addr]string{six: "02:00:00:00:00:09"} })
		}, netip.Addr{}, 2, "IPv6: As far as etcd tells it gets through, as fd10::11 by its own node node-2, but: another host uses fd10::11"},
		"one in doubt": {func(w *store.Whole) {
			agent(*w, "node-2", func(a *egress.Agent) { a.Conflicts = map[netip.Addr]string{six: "02:00:00:00:00:09"} })
		}, netip.Addr{}, 3, "as 10.10.0.11 by gateway node-1. IPv6: As far as etcd tells it gets through"},
		"an egress for IPv4 alone": {func(w *store.Whole) {
			e := w.Egresses["web"]
			e.Addresses = e.Addresses[:1]
			w.Egresses["web"] = e
		}, netip.Addr{}, 0, "by gateway node-1. IPv6: It is dropped: egress web has no IPv6 address, and what fd44::5 sends is dropped"},
		"and a pod of IPv6 alone": {func(w *store.Whole) {
			e := w.Egresses["web"]
			e.Addresses = e.Addresses[:1]
			w.Egresses["web"] = e
			w.ByEgress["web"]["node-2"].Pods[0].IPs = []netip.Addr{pod6}
		}, netip.Addr{}, 2, "It is dropped: egress web has no IPv6 address"},
		"which is asked for IPv6": {func(w *store.Whole) {
			e := w.Egresses["web"]
			e.Addresses = e.Addresses[:1]
			w.Egresses["web"] = e
		}, other, 2, "It does not get through: egress web has no address of the family of fd44::5"},
	} {
		t.Run(name, func(t *testing.T) {
			w := whole()
			e := w.Egresses["web"]
			e.Addresses = append(e.Addresses, egress.Address{IP: six, ID: 2})
			w.Egresses["web"] = e
			w.Owners[six] = egress.Owner{IP: six, Node: "node-2", Lease: 0xa2}
			w.ByEgress["web"]["node-2"].Pods[0].IPs = append(w.ByEgress["web"]["node-2"].Pods[0].IPs, pod6)
			if tt.change != nil {
				tt.change(&w)
			}
			steps, err := trace(w, Question{Pod: "prod/web-1", To: tt.to}, time.Now(), nil)
			if text, status := conclude(steps); err != nil || status != tt.status || !strings.Contains(text, tt.want) {
				t.Errorf("%d %q, %v\nwant %d %q", status, text, err, tt.status, tt.want)
			}
		})
	}
}

func TestStatusIsOneScreenWithAnExitStatus(t *testing.T) {
	space := store.Space{Members: make([]store.Member, 3), Count: 3, Revision: 42}
	for name, tt := range map[string]struct {
		change func(*store.Whole)
		status int
		want   []string
	}{
		"all is well":        {func(*store.Whole) {}, 0, []string{"3 members", "leader crdsync-1", "2, 2 with a live agent, 0 cordoned", "1 with 1 pods; 1 of 1 IPs are held", "pool 1 of 2", "all is well"}},
		"an IP on no node":   {func(w *store.Whole) { delete(w.Owners, ip) }, 2, []string{"0 of 1 IPs are held", "broken", "egress web: no node holds 10.10.0.11 yet"}},
		"no agent on a node": {func(w *store.Whole) { delete(w.Agents, "node-2") }, 3, []string{"1 with a live agent", "degraded", "node node-2: its agent is down"}},
		"no leader":          {func(w *store.Whole) { w.Leader = "" }, 3, []string{"crdsync: none leads"}},
		"a fault": {func(w *store.Whole) {
			agent(*w, "node-1", func(a *egress.Agent) { a.Faults = map[string]string{"routes": "EPERM"} })
		}, 3, []string{"node node-1: routes: EPERM"}},
		"what --insecure allowed": {func(w *store.Whole) {
			for _, node := range []string{"node-1", "node-2"} {
				agent(*w, node, func(a *egress.Agent) { a.Exposed = "http://10.0.0.1:2379 without TLS" })
			}
		}, 0, []string{"noted", "etcd: agents speak to it http://10.0.0.1:2379 without TLS, as --insecure allows", "any node: node-1, node-2", "all is well"}},
		"both": {func(w *store.Whole) {
			w.Leader = ""
			delete(w.Egresses, "web")
			w.Egresses["x"] = egress.Policy{Name: "x"}
		}, 2, []string{"egress x: it has no address", "none leads"}},
		"a record that cannot be read": {func(w *store.Whole) { w.Faults = []egress.Fault{{Key: "pools/x", Err: errors.New("no JSON")}} }, 3, []string{"record pools/x"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := whole()
			tt.change(&w)
			var out bytes.Buffer
			err := status(w, space, time.Now(), "", &out)
			got, v := 0, Verdict{}
			if errors.As(err, &v) {
				got = v.Status
			} else if err != nil {
				t.Fatal(err)
			}
			if got != tt.status {
				t.Errorf("exit status %d, want %d: %v", got, tt.status, err)
			}
			for _, text := range tt.want {
				if !strings.Contains(out.String(), text) {
					t.Errorf("%q is not in\n%s", text, out.String())
				}
			}
			if lines := strings.Count(out.String(), "\n"); lines > 40 {
				t.Errorf("%d lines", lines)
			}
		})
	}
	// A thousand faults are still a screen, and all of them in JSON.
	w := whole()
	for i := range 1000 {
		w.Faults = append(w.Faults, egress.Fault{Key: strings.Repeat("x", i%7), Err: errors.New("no JSON")})
	}
	var text, all bytes.Buffer
	_, _ = status(w, space, time.Now(), "", &text), status(w, space, time.Now(), "json", &all)
	if strings.Count(text.String(), "\n") > 40 || strings.Count(all.String(), "no JSON") != 1000 {
		t.Errorf("%d lines of text, %d faults in JSON", strings.Count(text.String(), "\n"), strings.Count(all.String(), "no JSON"))
	}
}

func TestAVerdictOfTheMomentOfAMoveIsTakenAgain(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(w *store.Whole)
		want   bool
	}{
		"nothing":            {func(*store.Whole) {}, false},
		"another owner":      {func(w *store.Whole) { w.Owners[ip] = egress.Owner{IP: ip, Node: "node-2", Revision: 9} }, true},
		"a lock taken anew":  {func(w *store.Whole) { o := w.Owners[ip]; o.Revision++; w.Owners[ip] = o }, true},
		"no owner":           {func(w *store.Whole) { delete(w.Owners, ip) }, true},
		"a move":             {func(w *store.Whole) { w.Moves = map[netip.Addr]egress.Move{ip: {IP: ip, To: "node-2"}} }, true},
		"another IP":         {func(w *store.Whole) { w.Egresses["web"] = egress.Policy{Name: "web"} }, true},
		"a pod that is gone": {func(w *store.Whole) { w.ByEgress = nil }, true},
		"an agent that died": {func(w *store.Whole) { delete(w.Agents, "node-1") }, false},
	} {
		w := whole()
		tt.change(&w)
		if got := moved(whole(), w, "prod/web-1"); got != tt.want {
			t.Errorf("%s: %t, want %t", name, got, tt.want)
		}
	}
}

func TestDescribePrintsOneThing(t *testing.T) {
	w := whole()
	w.Pins = map[netip.Addr]egress.Pin{ip: {IP: ip, Node: "node-1"}}
	w.Moves = map[netip.Addr]egress.Move{ip: {IP: ip, To: "node-2", Since: time.Now(), By: "bob@desk"}}
	agent(w, "node-2", func(a *egress.Agent) {
		a.Ports, a.Refused = map[netip.Addr]egress.PortUse{ip: {Want: 2048}}, map[string]string{"pool": "VLAN 7 is eth0.7's"}
	})
	agent(w, "node-1", func(a *egress.Agent) { a.Conflicts = map[netip.Addr]string{ip: "02:00:00:00:00:09 on eth0"} })
	agent(w, "node-2", func(a *egress.Agent) { a.Exposed = "http://10.10.0.1:2379 without TLS" })
	history := []egress.Tenure{{IP: ip, Node: "node-1", Since: time.Now(), Why: egress.ReasonClaim}}
	for _, tt := range []struct {
		kind, name string
		want       []string
	}{
		{"egress", "web", []string{"10.10.0.11, id 1, of pool pool, on node-1", "node-2: prod/web-1, ports 2048-3071", "10.10.0.11 to node-2, asked for 0s ago, by bob@desk",
			"Pinned:", "1024 of 63488 of 10.10.0.11 are given out, to 1 nodes", "Wrong:"}},
		{"ip", "10.10.0.11", []string{"id 1", "Egress:", "web", "Pinned:", "Move:", "to node-2", "2048-3071 of node-2, used", "Wanted:", "node-2 asks for a block of 2048 ports", "History:", "claim", "02:00:00:00:00:09"}},
		{"node", "node-1", []string{"index 1", "Agent:", "v1", "Holds:", "10.10.0.11", "Room:", "1 of -", "10.10.0.11 to it", "from node-1 to node-2", "Wrong:"}},
		{"node", "node-2", []string{"web: prod/web-1", "of no egress: prod/db-1", "Etcd:", "http://10.10.0.1:2379 without TLS"}},
		{"pool", "pool", []string{"10.10.0.11-10.10.0.12", "1 of 2", "10.10.0.11 of web, on node-1", "node-1 can hold its IPs", "node-2 cannot hold its IPs: VLAN 7 is eth0.7's", "Wrong:"}},
		{"pod", "prod/web-1", []string{"selected by egress web", "VXLAN from node-2"}},
	} {
		rows, err := describe(w, tt.kind, tt.name, history, time.Now())
		var out bytes.Buffer
		if err == nil {
			err = writeTable(&out, "", rows)
		}
		for _, text := range tt.want {
			if err != nil || !strings.Contains(out.String(), text) {
				t.Errorf("describe %s %s: %v; %q is not in\n%s", tt.kind, tt.name, err, text, out.String())
			}
		}
	}
	for kind, name := range map[string]string{"egress": "x", "ip": "10.10.0.99", "node": "x", "pod": "prod/x", "pool": "x"} {
		if _, err := describe(w, kind, name, nil, time.Now()); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("describe %s %s, which is not there: %v", kind, name, err)
		}
	}
}

// What is wrong with 10.10.0.11 is not said of 10.10.0.1.
func TestAnAddressIsFoundWhole(t *testing.T) {
	for _, tt := range []struct {
		text, ip string
		want     bool
	}{
		{"no node holds 10.10.0.11 yet", "10.10.0.11", true},
		{"no node holds 10.10.0.11 yet", "10.10.0.1", false},
		{"no node holds 110.10.0.11 yet", "10.10.0.11", false},
		{"10.10.0.11: another has it", "10.10.0.11", true},
		{"of 10.10.0.12, and of 10.10.0.11.", "10.10.0.11", true},
		{"of 10.10.0.110 and 10.10.0.11", "10.10.0.11", true},
		{"fd10::11 is used", "fd10::11", true},
		{"fd10::11 is used", "fd10::1", false},
		{"fd10::11:2 is used", "fd10::11", false},
		{"fd10::11: is used", "fd10::11", true},
		{"", "fd10::11", false},
	} {
		if got := mentions(tt.text, netip.MustParseAddr(tt.ip)); got != tt.want {
			t.Errorf("%q has %s in it: %t", tt.text, tt.ip, got)
		}
	}
}

// The records come from a real etcd, the election's too.
func TestStatusAndTraceReadEtcd(t *testing.T) {
	c := client(t)
	w := whole()
	for name, n := range w.Nodes {
		put(t, c, store.NodeKey(name), n)
	}
	for name, a := range w.Agents {
		put(t, c, store.AgentKey(name), a)
	}
	put(t, c, store.PoolKey("pool"), w.Pools["pool"])
	put(t, c, store.EgressKey("web"), w.Egresses["web"])
	put(t, c, store.MembersByEgressKey("web", "node-2"), w.ByEgress["web"]["node-2"])
	put(t, c, store.MembersByNodeKey("node-2", "web"), w.ByEgress["web"]["node-2"])
	put(t, c, store.MembersByNodeKey("node-2", "-"), w.Unselected["node-2"])
	put(t, c, store.BlockKey(ip, 2048), w.Blocks[0])
	lead, err := c.Campaign(t.Context(), store.CrdsyncElection, "crdsync-7", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	var v Verdict
	if err := Status(t.Context(), c, "", &out); !errors.As(err, &v) || v.Status != 2 || !strings.Contains(out.String(), "leader crdsync-7") {
		t.Errorf("status: %v\n%s", err, out.String())
	}
	full := &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE}
	if _, err := pb.NewMaintenanceClient(c.Etcd().ActiveConnection()).Alarm(t.Context(), full); err != nil {
		t.Fatal(err)
	}
	out.Reset()
	if err := Trace(t.Context(), c, Question{Pod: "prod/web-1"}, nil, "", "", &out); !errors.As(err, &v) || v.Status != 2 || !strings.Contains(out.String(), "etcd is full") {
		t.Errorf("trace in a full etcd: %v\n%s", err, out.String())
	}
	if err := c.Disarm(t.Context()); err != nil {
		t.Fatal(err)
	}
	put(t, c, store.OwnerKey(ip), w.Owners[ip]) // its lease is not that of the agent: the test has none
	out.Reset()
	if err := Trace(t.Context(), c, Question{Pod: "prod/web-1"}, nil, "", "", &out); !errors.As(err, &v) || v.Status != 2 || !strings.Contains(out.String(), "of a former agent") {
		t.Errorf("trace: %v\n%s", err, out.String())
	}
	out.Reset()
	if err := Trace(t.Context(), c, Question{Pod: "prod/db-1"}, nil, "", "json", &out); err != nil || !strings.Contains(out.String(), "no egress selects it") {
		t.Errorf("trace of a pod of no egress: %v\n%s", err, out.String())
	}
	if err := lead.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	out.Reset()
	if err := Status(t.Context(), c, "yaml", &out); !errors.As(err, &v) || v.Status != 2 || !strings.Contains(out.String(), "of a former") {
		t.Errorf("status with a lock of a former agent: %v\n%s", err, out.String())
	}
	former := w.Agents["node-1"]
	former.Lease = egress.FormatLease(0)
	put(t, c, store.AgentKey("node-1"), former)
	out.Reset()
	if err := Status(t.Context(), c, "yaml", &out); !errors.As(err, &v) || v.Status != 3 || !strings.Contains(out.String(), "none leads") {
		t.Errorf("status without a leader: %v\n%s", err, out.String())
	}
}
