package operator

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// Faults of kernels, beside records in which all is well. What a kernel says goes before the record.
func TestTraceGoesByTheKernelsOfTheNodes(t *testing.T) {
	type said = map[string]*egress.Kernel
	for name, tt := range map[string]struct {
		change func(w *store.Whole, home, gateway *egress.Kernel, silent map[string]error)
		status int
		want   string // in the verdict
		step   string // in a step
	}{
		"nothing": {func(*store.Whole, *egress.Kernel, *egress.Kernel, map[string]error) {}, 0, "As the kernels of its nodes tell it gets through", "node-1 has a permit"},
		"no permit": {func(_ *store.Whole, _, g *egress.Kernel, _ map[string]error) { g.Permit, g.Answers = 0, false }, 2,
			"does not get through: node-1 has no permit for 10.10.0.11", ""},
		"a permit that does not answer": {func(_ *store.Whole, _, g *egress.Kernel, _ map[string]error) { g.Answers = false }, 2, "does not answer for it", ""},
		"one that does not answer, during a move": {func(w *store.Whole, _, g *egress.Kernel, _ map[string]error) {
			g.Answers = false
			w.Moves = map[netip.Addr]egress.Move{ip: {IP: ip, To: "node-2", Since: time.Now()}}
		}, 0, "gets through", ""},
		"a pod that the kernel does not know": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) { h.PodID = 0 }, 2, "node-2 has 10.244.1.5 as no pod", ""},
		"a pod of another egress IP":          {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) { h.PodID = 9 }, 2, "as a pod of id 9", ""},
		"no next hop":                         {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) { h.Steered = false }, 2, "no next hop for 10.10.0.11", ""},
		"a former gateway":                    {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) { h.Gateway = 5 }, 2, "another gateway than node-1", ""},
		"a deleted rule": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) {
			h.Differs, h.Differed = []string{"table inet egret: chain postrouting: 3 of 4 rules"}, 2
		}, 3, "the kernel of node-2 is not as its agent wants it, in 2 places: table inet egret: chain postrouting: 3 of 4 rules", ""},
		"a route of the gateway": {func(_ *store.Whole, _, g *egress.Kernel, _ map[string]error) {
			g.Differs, g.Differed = []string{"route add"}, 1
		}, 3,
			"the kernel of node-1 is not as its agent wants it", ""},
		"an agent that is cut off": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) { h.Watching = false }, 3, "node-2 does not follow etcd", ""},
		"the guard":                {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) { h.Guarded = 0.5 }, 3, "guard of node-2 dropped a packet of 10.10.0.11 0.5s ago", ""},
		"the guard, a while ago":   {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) { h.Guarded = 20 }, 0, "gets through", ""},
		"counters of the pod's node": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) {
			h.Dropped = map[string]uint64{"guard_dropped": 3, "forged_dropped": 2, "no_nexthop": 0, "bandwidth_dropped": 9}
		}, 0, "gets through", "kernel: node-2 has dropped packets, of any pod, since its tables were made: forged_dropped 2, guard_dropped 3\n"},
		"counters of the gateway": {func(w *store.Whole, _, g *egress.Kernel, _ map[string]error) {
			g.Dropped = map[string]uint64{"arp_dropped": 1, "bandwidth_dropped": 9} // by the limit of another
		}, 0, "gets through", "node-1 has dropped packets, of any pod, since its tables were made: arp_dropped 1\n"},
		"a limit, and what was above": {func(w *store.Whole, _, g *egress.Kernel, _ map[string]error) {
			p := w.Egresses["web"]
			p.Bandwidth = &egress.Bandwidth{Rate: 1000, Burst: 2000}
			w.Egresses["web"], g.Dropped = p, map[string]uint64{"bandwidth_dropped": 9}
		}, 0, "gets through", "is dropped\nlimit: node-1 has dropped 9 packets above the limits of its egress IPs, all together, since"},
		"a record that says that the gateway is dead, and its kernel serves": {func(w *store.Whole, _, _ *egress.Kernel, _ map[string]error) { delete(w.Agents, "node-1") }, 3,
			"its kernel has a permit all the same", ""},
		"one that is silent": {func(_ *store.Whole, _, _ *egress.Kernel, silent map[string]error) {
			silent["node-1"] = errors.New("timeout")
		}, 0,
			"As far as etcd tells it gets through", "node-1 is told by the records alone: timeout"},
		"one that is silent, and a fault at the other": {func(_ *store.Whole, h, _ *egress.Kernel, silent map[string]error) {
			silent["node-1"], h.Steered = errors.New("timeout"), false
		}, 2, "no next hop", "node-1 is told by the records alone"},
		"a gateway that is cut off": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) {
			h.Path.Overlay.Silent, h.Path.Overlay.Neighbour = true, "FAILED"
		}, 2, "does not get through: 10.10.0.101, the underlay address of node-1, does not answer ARP on link eth0 of node-2, whose neighbour entry is FAILED", ""},
		"a gateway that is cut off just now": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) {
			h.Path.Overlay.Silent = true
		}, 3, "does not answer ARP on link eth0 of node-2, whose neighbour entry is REACHABLE", ""},
		"a router to the gateway": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) {
			h.Path.Overlay.Via, h.Path.Overlay.Silent, h.Path.Overlay.Neighbour = netip.MustParseAddr("10.10.0.1"), true, "INCOMPLETE"
		}, 2, "10.10.0.1, the router to 10.10.0.101, the underlay address of node-1, does not answer", ""},
		"no route to the gateway": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) {
			h.Path.Overlay = &egress.Hop{To: h.Path.Overlay.To, Fault: "network is unreachable"}
		}, 2, "node-2 has no route to 10.10.0.101, the underlay address of node-1: network is unreachable", ""},
		"a gateway that the pod's node does not know": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) {
			h.Path.Overlay = &egress.Hop{Fault: "the node is not known here"}
		}, 2, "node-2 cannot send to node-1: the node is not known here", ""},
		"no way back from the gateway": {func(_ *store.Whole, _, g *egress.Kernel, _ map[string]error) {
			g.Path.Overlay.Down = "without a carrier"
		}, 2, "link eth0 of node-1, by which it sends to 10.10.0.102, the underlay address of node-2, is without a carrier", ""},
		"a smaller MTU of the gateway": {func(_ *store.Whole, _, g *egress.Kernel, _ map[string]error) {
			g.Path.Overlay.MTU, g.Path.OverlayMTU = 1400, 1350
		}, 3, "the MTU is too small: node-2 puts packets of up to 1450 bytes into the overlay, which adds 50, and link eth0 of node-1 takes 1400", ""},
		"a smaller MTU on the way": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) { h.Path.Overlay.MTU = 1420 }, 3,
			"link eth0 of node-2 takes 1420: larger packets are lost", ""},
		"a jumbo overlay": {func(_ *store.Whole, h, g *egress.Kernel, _ map[string]error) {
			h.Path.Overlay.MTU, h.Path.OverlayMTU, g.Path.Overlay.MTU, g.Path.OverlayMTU = 9000, 8950, 9000, 8950
		}, 0, "gets through", "the pod's link takes 1500 bytes, the overlay of node-2 8950"},
		"a router outside that is gone": {func(_ *store.Whole, _, g *egress.Kernel, _ map[string]error) {
			g.Path.Exit = &egress.Hop{To: ip, Via: netip.MustParseAddr("10.10.0.1"), Link: "eth0", Neighbour: "FAILED", Silent: true}
		}, 2, "10.10.0.1, the router to 10.10.0.11, the way out, does not answer ARP on link eth0 of node-1", ""},
		"a rule of another program": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) {
			h.Path.Diverted = "out by link eth1 in place of egret.vx"
		}, 2, "node-2 sends what is for node-1 out by link eth1 in place of egret.vx: an ip rule or a route of another program", ""},
		"a route of another program": {func(_ *store.Whole, _, g *egress.Kernel, _ map[string]error) {
			g.Path.Diverted = "nowhere (no route to host) in place of link egret.100"
		}, 2, "node-1 sends what leaves nowhere (no route to host) in place of link egret.100", ""},
		"ports that are all used": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) { h.PortsUsed = 1024 }, 3,
			"all 1024 ports that node-2 has of 10.10.0.11 are in use to one destination", ""},
		"a VLAN that ends at the switch": {func(w *store.Whole, _, g *egress.Kernel, _ map[string]error) {
			to := netip.MustParseAddr("10.20.0.1")
			p := w.Pools["pool"]
			p.Subnet = &egress.Subnet{Gateway: to, PrefixLength: 24, VLAN: 100}
			w.Pools = map[string]egress.Pool{"pool": p}
			g.Path.Exit = &egress.Hop{To: to, Via: to, Link: "egret.100", Neighbour: "FAILED", Silent: true}
		}, 2, "10.20.0.1, the gateway of 10.20.0.0/24, does not answer ARP on link egret.100 of node-1, whose neighbour entry is FAILED: VLAN 100 of the switch may not reach node-1", ""},
		"an agent that could not read its routes": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) {
			h.Path = egress.Path{Unread: "no buffer space"}
		}, 0, "gets through", "the next hops of node-2 are not all known: no buffer space"},
		"agents of a version that tells no next hops": {func(_ *store.Whole, h, g *egress.Kernel, _ map[string]error) {
			h.Path, g.Path = egress.Path{}, egress.Path{}
		}, 0, "As the kernels of its nodes tell it gets through", ""},
		"an agent that writes to the terminal": {func(_ *store.Whole, h, _ *egress.Kernel, _ map[string]error) {
			h.Differed, h.Differs = 1, []string{"\x1b[2J\r\nall is well" + strings.Repeat("!", 1<<20)}
		}, 3, "in 1 places: ?[2J??all is well!!!", ""},
		"both are out of reach": {func(_ *store.Whole, _, _ *egress.Kernel, silent map[string]error) {
			silent["node-1"], silent["node-2"] = ErrNoWay, fmt.Errorf("%w: the agent that answers is that of node-3", ErrNoWay)
		}, 0, "As far as etcd tells it gets through", "leaves: as 10.10.0.11 by gateway node-1\nnot asked: the agents of node-2 and node-1 are not reached from here: " +
			"--agents-port asks them, or, that of node-2, `kubectl exec -n egret-system $(kubectl get pods -n egret-system -o name " +
			"-l app.kubernetes.io/name=egret-agent --field-selector spec.nodeName=node-2) -- egret trace prod/web-1`\n"},
		"the gateway is out of reach": {func(_ *store.Whole, _, _ *egress.Kernel, silent map[string]error) {
			silent["node-1"] = ErrNoWay
		}, 0, "As far as etcd tells it gets through", "not asked: the agent of node-1 is not reached from here: --agents-port asks it, or `kubectl exec"},
	} {
		t.Run(name, func(t *testing.T) {
			w := whole()
			home := egress.Kernel{Node: "node-2", Watching: true, PodID: 1, Steered: true, Gateway: 1, First: 2048, Ports: 1024, Guarded: -1}
			gateway := egress.Kernel{Node: "node-1", Watching: true, Permit: 0.4, Answers: true, Guarded: -1}
			hop := func(to string) *egress.Hop {
				ip := netip.MustParseAddr(to)
				return &egress.Hop{To: ip, Via: ip, Link: "eth0", MTU: 1500, Neighbour: "REACHABLE"}
			}
			home.Path = egress.Path{Overlay: hop("10.10.0.101"), OverlayMTU: 1450, PodMTU: 1500}
			gateway.Path = egress.Path{Overlay: hop("10.10.0.102"), OverlayMTU: 1450, Exit: hop("10.10.0.1")}
			silent := map[string]error{}
			tt.change(&w, &home, &gateway, silent)
			steps, err := trace(w, Question{Pod: "prod/web-1", Namespace: "egret-system"}, time.Now(), func(_ store.Whole, q egress.KernelQuestion, h, g string) kernels {
				if h != "node-2" || g != "node-1" || q != (egress.KernelQuestion{Pod: podIP, IP: ip, ID: 1}) {
					t.Errorf("asked %+v of %s and %s", q, h, g)
				}
				k := kernels{said: map[string]egress.Kernel{}, silent: silent}
				for node, have := range (said{"node-1": &gateway, "node-2": &home}) {
					if _, ok := silent[node]; !ok {
						k.said[node] = *have
					}
				}
				return k
			})
			if err != nil {
				t.Fatal(err)
			}
			text, status := conclude(steps)
			var all strings.Builder
			for _, s := range steps {
				all.WriteString(s.What + ": " + s.Text + "\n")
			}
			if len(text) > 2*longest || strings.ContainsRune(text, 0x1b) {
				t.Errorf("a verdict of %d bytes: %.200q", len(text), text)
			}
			if status != tt.status || !strings.Contains(text, tt.want) || !strings.Contains(all.String(), tt.step) {
				t.Errorf("verdict %d %q, want %d and %q, and a step with %q:\n%s", status, text, tt.status, tt.want, tt.step, all.String())
			}
		})
	}
}

// Where no egress applies, a kernel whose agent learns of nothing new may have one that applied before.
func TestTraceOfWhatNoEgressAppliesToAsksThePodsNode(t *testing.T) {
	outside, service := netip.MustParseAddr("198.51.100.9"), netip.MustParseAddr("10.96.0.1")
	other, other6 := podIP.Next(), netip.MustParseAddr("fd44::6")
	const as = "It leaves as if there were no egress, with the address that the CNI gives to it: "
	for name, tt := range map[string]struct {
		q      Question
		change func(w *store.Whole, k *egress.Kernel)
		silent error
		status int
		want   string // in the verdict
		step   string // in a step
	}{
		"no egress": {Question{Pod: "prod/db-1"}, nil, nil, 0, as + "no egress selects it", "node-2 has 10.244.1.6 as no pod of an egress, either"},
		"a service": {Question{Pod: "prod/web-1", To: service}, func(_ *store.Whole, k *egress.Kernel) {
			k.PodID = 1
		}, nil, 0, as + "10.96.0.1 is of ServiceCIDR kubernetes", "its agent v1 is alive"},
		"a service that the kernel excepts": {Question{Pod: "prod/web-1", To: service}, func(_ *store.Whole, k *egress.Kernel) {
			k.Excepted = netip.MustParsePrefix("10.96.0.0/16")
		}, nil, 0, as, "node-2 has the exception, too: 10.96.0.0/16"},
		"an agent that is down": {Question{Pod: "prod/db-1", To: outside}, func(w *store.Whole, _ *egress.Kernel) {
			delete(w.Agents, "node-2")
		}, errors.New("timeout"), 3, as + "no egress selects it: labels of the pod and its namespace are not what any egress's appliedTo asks for, " +
			"but: the agent of node-2 is down", "by the records alone: timeout"},
		"a service, and an agent that was stopped": {Question{Pod: "prod/web-1", To: service}, func(w *store.Whole, _ *egress.Kernel) {
			agent(*w, "node-2", func(a *egress.Agent) { a.Restarting = true })
		}, nil, 3, ", but: the agent of node-2 was told to stop", ""},
		"a pod that the kernel has still": {Question{Pod: "prod/db-1"}, func(_ *store.Whole, k *egress.Kernel) {
			k.PodID = 1
		}, nil, 3, ", but: node-2 has 10.244.1.6 as a pod of egress IP 10.10.0.11: it leaves with that.", ""},
		"of an egress that is gone": {Question{Pod: "prod/db-1"}, func(_ *store.Whole, k *egress.Kernel) {
			k.PodID = 9
		}, nil, 3, "as a pod of the egress IP of id 9", ""},
		"an agent that is cut off": {Question{Pod: "prod/web-1", To: service}, func(_ *store.Whole, k *egress.Kernel) {
			k.Watching = false
		}, nil, 3, ", but: the agent of node-2 does not follow etcd", ""},
		"a flag's, and an agent that is cut off": {Question{Pod: "prod/web-1", To: outside}, func(w *store.Whole, k *egress.Kernel) {
			k.Excepted, k.Watching = netip.MustParsePrefix("198.51.100.0/24"), false
			w.Egresses["web"] = egress.Policy{Name: "web"} // which has no address
		}, nil, 3, "198.51.100.9 is in 198.51.100.0/24, to which no egress applies on node-2 (--egress.exceptCIDRs or --cluster-cidrs of its agent), " +
			"but: the agent of node-2 does not follow", ""},
		"a family that the egress is not for": {Question{Pod: "prod/web-1", To: netip.MustParseAddr("2001:db8::9")}, func(w *store.Whole, _ *egress.Kernel) {
			pod := egress.Member{Pod: "prod/web-1", IPs: []netip.Addr{other6}}
			w.Unselected["node-2"] = egress.Members{Egress: "-", Node: "node-2", Pods: []egress.Member{pod}}
		}, nil, 0, as + "the egress that selects it is for the other family alone: none applies to fd44::6", "node-2 has fd44::6 as no pod of an egress, either"},
	} {
		t.Run(name, func(t *testing.T) {
			w := whole()
			k := egress.Kernel{Node: "node-2", Watching: true, Guarded: -1}
			if tt.change != nil {
				tt.change(&w, &k)
			}
			steps, err := trace(w, tt.q, time.Now(), func(_ store.Whole, q egress.KernelQuestion, home, _ string) kernels {
				if pods := []netip.Addr{podIP, other, other6}; home != "node-2" || !slices.Contains(pods, q.Pod) || q.To != tt.q.To {
					t.Errorf("%s was asked %+v", home, q)
				}
				if tt.silent != nil {
					return kernels{silent: map[string]error{"node-2": tt.silent}}
				}
				return kernels{said: map[string]egress.Kernel{"node-2": k}}
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
}
