package operator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egret-project/egret/egress"
)

// What two nodes saw of a packet of prod/web-1, whose way is by node-2 and its gateway node-1.
func TestAPacketIsFollowedToWhereItEnds(t *testing.T) {
	packet := func(what, in, out string, steps ...egress.LiveStep) egress.LivePacket {
		return egress.LivePacket{What: what, In: in, Out: out, Steps: steps}
	}
	passes := egress.LiveStep{Table: "inet egret", Chain: "steer", Rule: 12, Verdict: "accept"}
	drops := egress.LiveStep{Table: "ip filter", Chain: "FORWARD", Rule: 7, Verdict: "drop"}
	policy := egress.LiveStep{Table: "inet fw", Chain: "c", Verdict: "drop"}
	of := func(p egress.LivePacket, port uint16) egress.LivePacket { p.Port = port; return p }
	sent, out := of(packet(egress.LiveSent, "veth1", "egret.vx", passes), 4000), packet(egress.LiveTunnelOut, "", "eth0", passes)
	in, there := packet(egress.LiveTunnelIn, "eth0", ""), of(packet(egress.LiveSent, "egret.vx", "eth0", passes), 600)
	back, backOut := of(packet(egress.LiveBack, "eth0", "egret.vx", passes), 600), packet(egress.LiveTunnelOut, "", "eth0")
	backIn, home := packet(egress.LiveTunnelIn, "eth0", ""), of(packet(egress.LiveBack, "egret.vx", "veth1", passes), 600)
	unknown := sent
	sent.Translated = 600
	again := of(sent, 4001)
	again.Translated = 601
	type list = []egress.LivePacket
	dropAt := func(p egress.LivePacket, s egress.LiveStep) egress.LivePacket {
		p.Steps = append([]egress.LiveStep{passes}, s)
		return p
	}
	for name, tt := range map[string]struct {
		home, gateway list
		protocol      byte
		status        int
		want          string // in the verdict
		step          string
	}{
		"all the way":      {list{sent, out, backIn, home}, list{in, there, back, backOut}, 6, 0, "gets through, as 10.10.0.11 by gateway node-1.", "node-2, from the pod, in by veth1, out by egret.vx: inet egret steer: 12 accept"},
		"without traffic":  {nil, nil, 6, 3, "did not come to node-2 while it was waited for: have the pod send one", ""},
		"dropped at home":  {list{dropAt(sent, drops)}, nil, 6, 2, "node-2 drops it, from the pod: rule 7 (nft -a list chain ip filter FORWARD) of chain FORWARD of table ip filter", ""},
		"by a policy":      {list{dropAt(sent, policy)}, nil, 6, 2, "node-2 drops it, from the pod: the policy of chain c of table inet fw", ""},
		"without a route":  {list{packet(egress.LiveSent, "veth1", "", passes)}, nil, 6, 3, "was not seen on node-2 after it came by link veth1: it has no route, rp_filter", ""},
		"no connection":    {list{unknown, out}, list{in, there}, 6, 3, "node-2 has no connection of it, so it cannot be told from packets of other pods", ""},
		"no overlay":       {list{sent}, nil, 6, 3, "was not seen to go from node-2 into the overlay", ""},
		"dropped outgoing": {list{sent, dropAt(out, drops)}, nil, 6, 2, "node-2 drops it, into the overlay: rule 7", ""},
		"not seen between": {list{sent, out}, nil, 6, 3, "leaves node-2 for node-1, and was not seen to come there", ""},
		"dropped incoming": {list{sent, out}, list{dropAt(in, drops)}, 6, 2, "node-1 drops it, from the overlay: rule 7", ""},
		"not decapsulated": {list{sent, out}, list{in}, 6, 3, "was not seen to come out of the overlay on node-1", ""},
		"dropped there":    {list{sent, out}, list{in, dropAt(there, drops)}, 6, 2, "node-1 drops it, out of the overlay: rule 7", ""},
		"no route there":   {list{sent, out}, list{in, of(packet(egress.LiveSent, "egret.vx", "", passes), 600)}, 6, 3, "was not seen on node-1 after it came out of the overlay", ""},
		"no answer":        {list{sent, out}, list{in, there}, 6, 3, "no answer was seen there", "left node-1 by link eth0"},
		"none of UDP":      {list{sent, out}, list{in, there}, 17, 0, "gets through", "left node-1 by link eth0"},
		"answer dropped":   {list{sent, out}, list{in, there, dropAt(back, drops)}, 6, 2, "node-1 drops it, the answer: rule 7", ""},
		"answer not seen":  {list{sent, out}, list{in, there, back, backOut}, 6, 3, "the answer came to node-1, and was not seen out of the overlay on node-2", ""},
		"answer not taken": {list{sent, out, backIn, of(packet(egress.LiveBack, "egret.vx", ""), 600)}, list{in, there, back, backOut}, 6, 3, "the answer came to node-2, and was not seen to go on to the pod", ""},
		"answer dropped at home": {list{sent, out, backIn, dropAt(home, policy)}, list{in, there, back, backOut}, 6, 2,
			"node-2 drops it, the answer, out of the overlay: the policy", ""},

		"the second of two dropped": {list{sent, dropAt(again, drops)}, nil, 6, 2, "node-2 drops it, from the pod: rule 7", ""},
		"another pod's end before":  {list{sent, out}, list{of(back, 700), in, of(there, 700)}, 6, 3, "was not seen to come out of the overlay on node-1", ""},
		"another pod's dropped":     {list{sent, out, backIn, home}, list{of(dropAt(there, drops), 700), in, there, back}, 6, 3, "node-1 drops one that may be of another pod, out of the overlay: rule 7", ""},
		"its second connection":     {list{sent, out, again}, list{in, of(there, 700), dropAt(of(there, 601), drops)}, 6, 2, "node-1 drops it, out of the overlay: rule 7", ""},
		"seen at home alone":        {list{sent, out, backIn, home}, list{of(there, 700)}, 6, 0, "gets through", "an answer, or a refusal, came to the pod by link veth1 of node-2"},
		"another pod's answer":      {list{sent, out, backIn, of(home, 700)}, list{in, there}, 6, 3, "no answer was seen there", ""},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := whole()
			var heads [2]time.Time
			ask := func(_ context.Context, node string, _ []netip.Addr, page string, v url.Values, reply any) error {
				if page != "/live" {
					t.Errorf("asked at %s", page)
				}
				l := egress.Live{Node: node, Packets: tt.home}
				if node == "node-1" {
					heads[0], l.Packets = time.Now(), tt.gateway
				} else {
					heads[1] = time.Now()
				}
				q, err := egress.ParseLiveQuestion(v)
				if err != nil || q.Port != 443 && tt.protocol == 6 || (node == "node-1") != !q.Pod.IsValid() || q.Send != q.Pod.IsValid() || q.IP != ip {
					t.Errorf("%s was asked %v: %v", node, v, err)
				}
				b, err := json.Marshal(l)
				if err != nil {
					t.Error(err)
				}
				return json.Unmarshal(b, reply)
			}
			q := Question{Pod: "prod/web-1", To: netip.MustParseAddr("203.0.113.9"), Live: &Live{Protocol: tt.protocol, Port: 443, Page: "/live"}}
			steps, err := trace(w, q, time.Now(), nil)
			if err != nil {
				t.Fatal(err)
			}
			steps = append(steps, follow(t.Context(), w, q, ask)...)
			text, status := conclude(steps)
			var all strings.Builder
			for _, s := range steps {
				all.WriteString(s.What + ": " + s.Text + "\n")
			}
			if status != tt.status || !strings.Contains(text, tt.want) || !strings.Contains(all.String(), tt.step) {
				t.Errorf("%s: verdict %d %q, want %d and %q, and a step with %q:\n%s", name, status, text, tt.status, tt.want, tt.step, all.String())
			}
			if early := heads[1].Sub(heads[0]); early != headStart {
				t.Errorf("the gateway was asked %v before the pod's node", early)
			}
		})
	}
}

func TestAPacketThatNobodyFollowsIsNoVerdict(t *testing.T) {
	q := Question{Pod: "prod/web-1", To: netip.MustParseAddr("203.0.113.9"), Live: &Live{Protocol: 6}}
	for name, tt := range map[string]struct {
		err  error
		to   string
		want string
	}{
		"an older agent":  {errors.New("it does not answer such questions"), "203.0.113.9", "node-1 follows no packet: it does not answer such questions"},
		"no way to it":    {ErrNoWay, "203.0.113.9", "is not reached from here: --agents-port asks those of other nodes"},
		"no such address": {nil, "2001:db8::9", "nothing is followed: no node holds an egress IP of the pod, of the family of 2001:db8::9"},
	} {
		q.To = netip.MustParseAddr(tt.to)
		steps := follow(t.Context(), whole(), q, func(context.Context, string, []netip.Addr, string, url.Values, any) error { return tt.err })
		var all strings.Builder
		for _, s := range steps {
			all.WriteString(s.Text + "\n")
		}
		if !strings.Contains(all.String(), tt.want) {
			t.Errorf("%s:\n%s", name, all.String())
		}
	}
}

// A packet that is to be sent in the pod's name, and is not seen.
func TestAPacketOfNobodySaysWhoWasToSendIt(t *testing.T) {
	for name, tt := range map[string]struct {
		port uint16
		home egress.Live
		want string
	}{
		"sent":                {443, egress.Live{Sent: true}, "which node-2 sent in its name, was not seen there"},
		"not sent":            {443, egress.Live{Unsent: "no link"}, "node-2 sends nothing in the name of prod/web-1: no link. Have the pod send one"},
		"an older agent":      {443, egress.Live{}, "did not come to node-2 while it was waited for: have the pod send one"},
		"none that it can be": {0, egress.Live{}, "did not come to node-2 while it was waited for: have the pod send one"},
	} {
		synctest.Test(t, func(t *testing.T) {
			q := Question{Pod: "prod/web-1", To: netip.MustParseAddr("203.0.113.9"), Live: &Live{Protocol: 6, Port: tt.port}}
			steps := follow(t.Context(), whole(), q, func(_ context.Context, node string, _ []netip.Addr, _ string, v url.Values, reply any) error {
				if q, err := egress.ParseLiveQuestion(v); err != nil || q.Send != (node == "node-2" && tt.port != 0) {
					t.Errorf("%s: %s was asked %v: %v", name, node, v, err)
				}
				*reply.(*egress.Live) = tt.home
				return nil
			})
			if last := steps[len(steps)-1]; !strings.Contains(last.Text, tt.want) || last.Fault != doubts {
				t.Errorf("%s: %+v, want a doubt that says %q", name, last, tt.want)
			}
		})
	}
}

func TestBothNodesAreAskedAgainWhileOneIsBusyAndNoneWhereOneFails(t *testing.T) {
	q := Question{Pod: "prod/web-1", To: netip.MustParseAddr("203.0.113.9"), Live: &Live{Protocol: 6}}
	const trace = 6500 * time.Millisecond
	for name, tt := range map[string]struct {
		busy, fails string        // a node; it is busy for 4 s
		took        time.Duration // at least, and half a second longer at most
		want        string
	}{
		"neither":                {"", "", headStart + trace, "did not come to node-2 while it was waited for"},
		"a busy gateway":         {"node-1", "", 4*time.Second + headStart + trace, "did not come to node-2 while it was waited for"},
		"a busy node of the pod": {"node-2", "", 4*time.Second + trace, "did not come to node-2 while it was waited for"},
		"a gateway that fails":   {"", "node-1", 0, "node-1 follows no packet: no"},
		"a node that fails":      {"", "node-2", headStart, "node-2 follows no packet: no"},
	} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			steps := follow(t.Context(), whole(), q, func(ctx context.Context, node string, _ []netip.Addr, _ string, _ url.Values, _ any) error {
				switch {
				case node == tt.busy && time.Since(began) < 4*time.Second:
					return fmt.Errorf("%w: ask again", errBusy)
				case node == tt.fails:
					return errors.New("no")
				}
				select {
				case <-ctx.Done():
				case <-time.After(trace):
				}
				return ctx.Err()
			})
			if took := time.Since(began); len(steps) != 1 || !strings.Contains(steps[0].Text, tt.want) || took < tt.took || took > tt.took+headStart+100*time.Millisecond {
				t.Errorf("%s: after %v, want %v: %+v", name, took, tt.took, steps)
			}
		})
	}
}
