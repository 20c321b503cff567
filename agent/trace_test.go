package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
)

// asks asks KernelPage as anybody may write it, and returns the status and what it says.
func asks(a *answerer, query string) (int, string) {
	w := httptest.NewRecorder()
	a.kernelPage(w, httptest.NewRequest(http.MethodGet, KernelPage+"?"+query, nil))
	return w.Code, w.Body.String()
}

// TestTheKernelIsToldAsItIs programs a kernel, lets others change it, and asks.
func TestTheKernelIsToldAsItIs(t *testing.T) {
	client := newEtcd(t)
	netns.Enter(t)
	cfg := Config{Node: "a", Log: slog.New(slog.DiscardHandler), Timing: Timing{Permit: time.Second, LeaseTTL: time.Minute}, Network: Network{ShareTables: true}}
	k, err := openKernel(cfg, newMachine(ownership.Config{Node: "a", Permit: time.Second}), nil, func() {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.tables.Close() })
	a := &agent{Config: cfg, kernel: k, view: client.NewView("a"), observers: observers{ports: newPorts(&ports{})}}
	who := &answerer{node: "a", kernel: a.readKernelOf}
	pod, other, ip := netip.MustParseAddr("10.244.0.5"), netip.MustParseAddr("10.244.0.6"), netip.MustParseAddr("10.10.0.11")
	q := egress.KernelQuestion{Pod: pod, IP: ip, ID: 7}
	if code, got := asks(who, q.Query().Encode()); code != http.StatusInternalServerError || !strings.Contains(got, "programming its kernel") {
		t.Errorf("before the kernel was programmed: %d %s", code, got)
	}
	block := egress.Block{IP: ip, First: 2048, Size: 64}
	d := plan.Desired{NFT: nft.State{Pods: map[netip.Addr]egress.ID{pod: 7, other: 8}, NextHops: map[egress.ID]egress.Mark{7: egress.ToGatewayMark},
		Gateways: map[egress.ID]int{7: 3}, Blocks: map[egress.ID]egress.Block{7: block}}}
	if applied, err := k.program(t.Context(), d); !applied || err != nil {
		t.Fatal(applied, err)
	}
	look := func(q egress.KernelQuestion) (out egress.Kernel) {
		t.Helper()
		code, got := asks(who, q.Query().Encode())
		for end := time.Now().Add(20 * time.Second); code == http.StatusServiceUnavailable && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			// on a busy machine a question takes long, and the agent rests then
			code, got = asks(who, q.Query().Encode())
		}
		if err := json.Unmarshal([]byte(got), &out); err != nil || code != http.StatusOK {
			t.Fatalf("%d %s: %v", code, got, err)
		}
		return out
	}
	if got := look(q); got.Node != "a" || got.PodID != 7 || !got.Steered || got.Gateway != 3 || got.First != 2048 || got.Ports != 64 || got.Differed != 0 ||
		got.Permit != 0 || got.Answers || got.Guarded >= 0 || got.Watching {
		t.Errorf("as it was programmed: %+v", got)
	}
	if got := look(egress.KernelQuestion{Pod: other, IP: ip, ID: 7}); got.PodID != 8 {
		t.Errorf("a pod of another egress: %+v", got)
	}
	// Of a pod that no record gives to an egress, the kernel may have one.
	for to, want := range map[netip.Addr]egress.ID{pod: 7, other: 8, netip.MustParseAddr("10.244.0.7"): 0} {
		if got := look(egress.KernelQuestion{Pod: to}); got.PodID != want || got.Connections != 0 || got.Permit != 0 || got.Guarded >= 0 || got.Differed != 0 {
			t.Errorf("%s alone: %+v", to, got)
		}
	}
	if err := k.tables.Permit([]nft.Permit{{IP: ip, Answer: true}}, time.Minute); err != nil {
		t.Fatal(err)
	}
	if got := look(q); got.Permit < 1 || got.Permit > 60 || !got.Answers {
		t.Errorf("with a permit: %+v", got)
	}
	if err := k.tables.Revoke(ip); err != nil {
		t.Fatal(err)
	}
	if got := look(q); got.Permit != 0 || got.Answers {
		t.Errorf("after its end: %+v", got)
	}
	// Ports of the block that are in use to one destination, of all pods, and of none but that block.
	connection := func(source netip.Addr, protocol, to string, toPort, port int) {
		t.Helper()
		state := map[string]string{"tcp": " --state ESTABLISHED", "udp": ""}[protocol]
		netns.Run(t, fmt.Sprintf("conntrack -I -p %s -s %s -d %s --sport %d --dport %d%s -t 600 -n %s:%d --mark %d", protocol, source, to, port, toPort, state, ip, port, egress.ID(7).ConnMark()))
	}
	for i, c := range []struct {
		source   netip.Addr
		protocol string
		to       string
		toPort   int
		port     int
	}{
		{pod, "tcp", "198.51.100.9", 443, 2050}, {other, "tcp", "198.51.100.9", 443, 2051}, {pod, "tcp", "198.51.100.9", 443, 2111},
		{pod, "tcp", "198.51.100.9", 80, 2052}, {pod, "udp", "198.51.100.9", 443, 2053}, {pod, "tcp", "198.51.100.8", 443, 2054},
		{pod, "tcp", "198.51.100.9", 443, 2112}, // of a block that is retired
	} {
		connection(c.source, c.protocol, c.to, c.toPort, c.port)
		if got := look(q); got.UsedTo != nil {
			t.Errorf("%d: no destination was asked for: %d ports", i, *got.UsedTo)
		}
	}
	to := netip.MustParseAddr("198.51.100.9")
	for _, tt := range []struct {
		protocol byte
		port     uint16
		want     int // -1: it is not told
	}{{6, 443, 3}, {6, 80, 1}, {17, 443, 1}, {17, 80, 0}, {132, 443, 0}, {1, 0, 0}, {6, 0, -1}, {0, 0, -1}, {47, 0, -1}} {
		q := q
		q.To, q.Protocol, q.Port = to, tt.protocol, tt.port
		got := look(q)
		if told := got.UsedTo != nil; told != (tt.want >= 0) || told && *got.UsedTo != tt.want || got.Connections != 6 {
			t.Errorf("protocol %d port %d: %+v; want %d ports", tt.protocol, tt.port, got, tt.want)
		}
	}
	before := netns.Run(t, "nft -s list ruleset")
	for _, line := range []string{"nft flush chain inet egret translate", "nft delete element inet egret pod4 { 10.244.0.5 }", "nft delete table inet egret"} {
		netns.Run(t, line)
		if got := look(q); got.Differed == 0 || len(got.Differs) > egress.MaxDiffers {
			t.Errorf("after %s: %+v", line, got)
		}
		damaged := netns.Run(t, "nft -s list ruleset")
		look(q)
		if after := netns.Run(t, "nft -s list ruleset"); after != damaged || after == before {
			t.Errorf("after %s a question changed the kernel, or the line did not:\n%s", line, cmp.Diff(damaged, after))
		}
		if _, err := k.program(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		if got := look(q); got.Differed != 0 {
			t.Errorf("mended after %s: %+v", line, got)
		}
	}
	for _, bad := range []string{"", "to=198.51.100.9", "id=1&pod=10.244.0.5", "ip=10.10.0.11&pod=10.244.0.5", "ip=&pod=10.244.0.5", "pod=x", "pod=10.244.0.5&to=fd00::1", "ip=10.10.0.11", "ip=10.10.0.11&id=0", "ip=10.10.0.11&id=65536", "ip=x&id=1", "ip=10.10.0.11&id=1&pod=fd00::1", "ip=10.10.0.11&id=1&to=fd00::1",
		"ip=10.10.0.11&id=1&to=x", "ip=10.10.0.11&id=1&to=224.0.0.1", "ip=10.10.0.11&id=1&to=255.255.255.255", "ip=10.10.0.11&id=1&to=169.254.0.1", "ip=fd00::11&id=1&to=fe80::1", "ip=fd00::11&id=1&to=ff02::1",
		"ip=10.10.0.11&id=1&protocol=256", "ip=10.10.0.11&id=1&protocol=tcp", "ip=10.10.0.11&id=1&protocol=6&port=65536", "ip=10.10.0.11&id=1&protocol=47&port=1", "ip=10.10.0.11&id=1&port=1",
		"ip=10.10.0.11&id=1&peer=0", "ip=10.10.0.11&id=1&peer=65536", "ip=fe80::1%25x&id=1",
		"ip=10.10.0.11&id=1&pod=" + strings.Repeat("x", 3000)} {
		if code, got := asks(who, bad); code != http.StatusBadRequest || len(got) > 500 {
			t.Errorf("%q: %d %s", bad, code, got)
		}
	}
}

func TestTheKernelTellsWhatExceptsADestination(t *testing.T) {
	except := []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:51::/48"), netip.MustParsePrefix("10.10.0.101/32")}
	for to, want := range map[string]string{"198.51.100.9": "198.51.100.0/24", "198.51.101.9": "", "2001:db8:51::9": "2001:db8:51::/48", "10.10.0.101": "10.10.0.101/32", "": ""} {
		var q egress.KernelQuestion
		if to != "" {
			q.To = netip.MustParseAddr(to)
		}
		b, err := json.Marshal(kernelOf(nft.State{Except: except}, q))
		var k egress.Kernel
		if err = errors.Join(err, json.Unmarshal(b, &k)); err != nil || k.Excepted.IsValid() != (want != "") || want != "" && k.Excepted.String() != want {
			t.Errorf("to %q: %s, %v; want %q", to, b, err, want)
		}
		if want == "" && strings.Contains(string(b), "excepted") {
			t.Errorf("to %q: %s", to, b)
		}
	}
}

// TestQuestionsOfTheKernelHoldUpNothing: who asks while the kernel is programmed is turned away rather than told a
// part of it, and who asks several times at once gets one answer.
func TestQuestionsOfTheKernelHoldUpNothing(t *testing.T) {
	k := &kernel{}
	written := k.programmed.begin()
	if _, _, err := k.differs(); !errors.Is(err, errProgramming) {
		t.Errorf("while the kernel is written to: %v", err)
	}
	written(&plan.Desired{})
	begun, end := make(chan bool), make(chan bool)
	a := &answerer{node: "a", kernel: func(context.Context, egress.KernelQuestion) (egress.Kernel, error) {
		begun <- true
		<-end
		return egress.Kernel{}, nil
	}}
	first := make(chan int)
	go func() { code, _ := asks(a, "ip=10.10.0.11&id=1"); first <- code }()
	<-begun
	for range 20 {
		if code, got := asks(a, "ip=10.10.0.11&id=1"); code != http.StatusServiceUnavailable {
			t.Errorf("beside another: %d %s", code, got)
		}
	}
	// `egret trace` asks the socket of its node for each of the nodes concerned.
	if code, got := asks(a, "ip=10.10.0.11&id=1&node=b"); code != http.StatusOK || strings.TrimSpace(got) != `{"node":"a"}` {
		t.Errorf("beside another, for another node: %d %s", code, got)
	}
	end <- true
	if code := <-first; code != http.StatusOK {
		t.Errorf("the first: %d", code)
	}
}
