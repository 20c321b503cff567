package nft

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/need"
)

var mutate = flag.String("fast-path-mutations", "", "compile the fast path with each check left out that this expression matches, which needs clang, and look for the test that fails")

// mutations are deliberate faults of the programs: a check that is left out, or something that is done otherwise.
var mutations = []struct {
	name     string
	from, to string // from occurs once in fast.c
}{
	{"paused", "off && !*off ? c : 0", "off ? c : 0"},
	{"came for this host", "skb->pkt_type == PACKET_HOST && ", ""},
	{"no VLAN", "!skb->vlan_present && skb->protocol == bpf_htons(ETH_P_IP);", "skb->protocol == bpf_htons(ETH_P_IP);"},
	{"EtherType", "!skb->vlan_present && skb->protocol == bpf_htons(ETH_P_IP);", "!skb->vlan_present;"},

	{"IP options", "*(__u8 *)ip != 0x45", "(*(__u8 *)ip & 0xf0) != 0x40"},
	{"IP version", "*(__u8 *)ip != 0x45", "(*(__u8 *)ip & 0xf) != 5"},
	{"fragments", "(ip->frag_off & bpf_htons(0xbfff)) || ", ""},
	{"fragments after the first", "bpf_htons(0xbfff)", "bpf_htons(0xa000)"},
	{"fragments before the last", "bpf_htons(0xbfff)", "bpf_htons(0x9fff)"},
	{"hops to go", "ip->ttl < 2", "ip->ttl < 1"},
	{"IP checksum", "fold(sum(ip)) != 0xffff", "0"},
	{"length of headers", "f->len < header || ", ""},
	{"cut off", "there < f->len || ", ""},
	{"something behind it in the overlay", "(!pad || skb->gso_size)", "skb->gso_size"},
	{"length of a TCP packet", "f->len < 40 || ", ""},
	{"length of the TCP header", "tcp[12] < 0x50 || ", ""},
	{"SYN", "tcp[13] & 2", "0"},
	{"protocol", "f->proto != 17", "0"},
	{"size of segments", "f->size = skb->gso_size + header", "f->size = header"},

	{"from 0.0.0.0/8", "top == 0 || top == 127", "top == 127"},
	{"from 127.0.0.0/8", "top == 0 || top == 127", "top == 0"},
	{"from groups", " || top >= 224", ""},
	{"from nobody's address", "!nobodys(f->s) && ", ""},
	{"to a group", " || nobodys(f.d)", ""},

	{"rules by protocol", ".l4_protocol = f->proto, ", ""},
	{"rules by source port", ".sport = bpf_htons(f->sp), ", ""},
	{"rules by destination port", ".dport = bpf_htons(f->dp),\n", "\n"},
	{"MTU of the route", ".tot_len = f->size, ", ""},
	{"rules by service class", ".tos = f->tos, ", ""},
	{"rules by source", ".tos = f->tos, .ipv4_src = f->s, ", ".tos = f->tos, "},
	{"rules by link", ".ifindex = link, .tos", ".ifindex = c->uplink, .tos"},
	{"the route is there", "flags) != BPF_FIB_LKUP_RET_SUCCESS", "flags) < 0"},
	{"a next hop of IPv4", " || q.family != AF_INET", ""},
	{"the route is by the uplink", "q.family != AF_INET || q.ifindex != c->uplink", "q.family != AF_INET"},
	{"the way back is there", "BPF_FIB_LOOKUP_SKIP_NEIGH) == BPF_FIB_LKUP_RET_SUCCESS", "BPF_FIB_LOOKUP_SKIP_NEIGH) >= 0"},
	{"the way back is by the uplink", " &&\n\t\tq.ifindex == c->uplink", ""},

	{"a hop less", "\tip->ttl--;\n", ""},
	{"carry of the checksum", " + (s >= 0xffff)", ""},
	{"checksum of a hop less", "ip->check = s + (s >= 0xffff);", "(void)s;"},
	{"a hop less, forwarded", "if (lower(skb))\n\t\treturn failed();\n\tcount(f.s", "count(f.s"},
	{"a hop less, back", "if (lower(skb))\n\t\treturn failed();\n\tcount(f.d", "count(f.d"},

	{"MTU of the overlay", "f->size > c->mtu || ", ""},
	{"longest packet", "f->len > 0xffff - ROOM", "0"},
	{"the way to a node by another link", "&o, LOOPBACK, 0, to", "&o, c->uplink, BPF_FIB_LOOKUP_OUTPUT, to"},
	{"MAC address of the node", "\t__builtin_memcpy(o->in.h_dest, dmac, 6);\n", ""},
	{"MAC address of this node", "\t__builtin_memcpy(o->in.h_source, c->mac, 6);\n", ""},
	{"the id", "mark & ID_BIT ? 0x88080000 | (mark & 0xffff) : 0x08000000", "0x08000000"},
	{"that it is an id", "0x88080000 | (mark & 0xffff) :", "0x88000000 | (mark & 0xffff) :"},
	{"VNI, sent", "o->vx[1] = bpf_htonl(OVERLAY_VNI << 8);", "o->vx[1] = 0;"},
	{"congestion told, sent", "ecn == 3 ? 2 : ecn", "ecn"},
	{"congestion may be told, sent", "ecn == 3 ? 2 : ecn", "0 & ecn"},
	{"not to be cut up", ".frag_off = bpf_htons(0x4000), ", ""},
	{"no mark, to a node", "skb->mark = 0;\n\tstep(WRAPPED);", "step(WRAPPED);"},
	{"no mark, forwarded", "\tskb->mark = 0;\n\treturn bpf_redirect_neigh(c->uplink, &to", "\treturn bpf_redirect_neigh(c->uplink, &to"},
	{"counted, sent", "\tcount(f.s, f.len, 0);\n", ""},
	{"counted, received", "\tcount(f.d, f.len, 1);\n", ""},

	{"whose block it is", "!n || !same(n->mac, mac) || ", "!n || "},
	{"the block's first port", ".port = f.sp & UNIT", ".port = f.sp & 0xff80"},
	{"the block's first port, back", ".port = f.dp & UNIT", ".port = f.dp & 0xff80"},
	{"no permit", "!until || *until <= bpf_ktime_get_boot_ns()", "(until && *until <= bpf_ktime_get_boot_ns())"},
	{"end of the permit", "*until <= bpf_ktime_get_boot_ns() || ", ""},
	{"a mark of the overlay that is no id", " || (skb->mark && (skb->mark & ~0xffffu) != ID_BIT))\n\t\treturn NEXT;\n\t__u8 mac[6];\n\t__builtin_memcpy(mac, eth->h_source", ")\n\t\treturn NEXT;\n\t__u8 mac[6];\n\t__builtin_memcpy(mac, eth->h_source"},
	{"for this host, by the kernel's overlay", "!plain(skb) || (void *)(eth + 1)", "(void *)(eth + 1)"},

	{"segments of the overlay", "> last(skb) || skb->gso_size)", "> last(skb))"},
	{"UDP checksum", "o->udp.check || ", ""},
	{"UDP length", "bpf_ntohs(o->udp.len) + sizeof(o->ip) != f->len || ", ""},
	{"congestion told", "(f->tos & 3) == 3 ||\n", "\n"},
	{"inner EtherType", "eth.h_proto != bpf_htons(ETH_P_IP) || ", ""},
	{"VNI", "o->vx[1] != bpf_htonl(OVERLAY_VNI << 8) || ", ""},
	{"for this node's overlay link", "!same(eth.h_dest, c->mac) ||\n", "\n"},
	{"flags of the overlay", "(flags != 0x08000000 && (flags & 0xffff0000) != 0x88080000)", "0"},
	{"the bit of an id", "(flags & 0xffff0000) != 0x88080000", "(flags & 0xfff70000) != 0x88000000"},
	{"the node's two addresses", "!p || p->underlay != f->s", "!p"},
	{"the way back to the node", "if (!comes(skb, c, f))\n\t\t\treturn NEXT;\n", "if (0)\n\t\t\treturn NEXT;\n"},
	{"the way back to the node, again", "now - p->heard > HEARD", "!p->heard"},
	{"the id, into the overlay link", "skb->mark = flags & 0x80000000 ? ID_BIT | (flags & 0xffff) : 0;", "skb->mark = 0;"},
	{"the inner Ethernet header", "\t*h = eth;\n", ""},

	{"for this host, from the uplink", "!plain(skb) || parse(skb, ETH_HLEN, 1, &f)", "parse(skb, ETH_HLEN, 1, &f)"},
	{"the overlay is UDP", "f.proto == 17 && f.dp == OVERLAY_PORT", "f.dp == OVERLAY_PORT"},
	{"the overlay's address", "f.dp == OVERLAY_PORT && f.d == c->self", "f.dp == OVERLAY_PORT"},
	{"something behind a packet of the overlay", "skb->len == f.len + ETH_HLEN ? unwrap(skb, c, &f) : NEXT", "unwrap(skb, c, &f)"},
	{"where an answer comes from", "!n || !comes(skb, c, &f) ||", "!n ||"},
	{"padding", "if (skb->len > f.len + ETH_HLEN && bpf_skb_change_tail(skb, f.len + ETH_HLEN, 0))", "if (0)"},

	{"what a process sends", "skb->sk || ", ""},
	{"no VLAN, to a node", "skb->sk || skb->vlan_present || ", "skb->sk || "},
	{"EtherType, to a node", "skb->protocol != bpf_htons(ETH_P_IP) || (void *)(eth + 1) > last(skb) ||", "(void *)(eth + 1) > last(skb) ||"},
	{"the overlay link's own address", "\t\t!same(eth->h_source, c->mac) || ", "\t\t"},
	{"a mark that is no id", "(mark && (mark & ~0xffffu) != ID_BIT))", "0)"},
}

// unmutable are the checks that no test finds missing, since nothing can be made that only they stop.
var unmutable = map[string]string{
	"segments of the overlay": "what becomes of them shows where a card cuts them up, as veth does not",
	"the overlay is UDP":      "the VNI of what is no UDP is the length of a TCP header that is too short",
	"a mark that is no id":    "the chain to_node, which sees a packet before, leaves no other mark",
	"no mark, forwarded":      unseen, "no mark, to a node": unseen,
	"the overlay link's own address": ofASocket, "no VLAN, to a node": ofASocket, "EtherType, to a node": ofASocket,
}

const (
	unseen    = "netfilter does not see what programs send on"
	ofASocket = "a frame of others that a process on this machine makes is known by its socket, also through veth and bridge"
)

// TestEachCheckOfTheFastPathIsFoundMissing leaves out one check of the programs after another: a test of this file's
// neighbours fails for each. Compiling them takes clang, so what it found is in testdata; it has to be run again, as
// the error says, when the programs change.
func TestEachCheckOfTheFastPathIsFoundMissing(t *testing.T) {
	source, err := os.ReadFile("../fastpath/fast.c")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutations {
		if n := strings.Count(string(source), m.from); n != 1 {
			t.Errorf("%s: fast.c has %d times %q, want 1", m.name, n, m.from)
		}
	}
	const record = "testdata/fastpath-mutations.txt"
	// What is compiled: without comments.
	code := regexp.MustCompile(`(?s)//[^\n]*|/\*.*?\*/|\s+`).ReplaceAll(source, []byte(" "))
	head := fmt.Sprintf("fast.c without comments has the SHA-256 %x; without a check, a test fails:\n", sha256.Sum256(regexp.MustCompile(` +`).ReplaceAll(code, []byte(" "))))
	have, err := os.ReadFile(record)
	if err != nil && *mutate == "" {
		t.Fatal(err)
	}
	found := map[string]string{} // by the name of the mutation, as far as it is of this source
	if lines, ok := strings.CutPrefix(string(have), head); ok {
		for line := range strings.Lines(lines) {
			name, by, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
			found[name] = by
		}
	}
	if *mutate == "" {
		for _, m := range mutations {
			if found[m.name] == "" {
				t.Errorf("%s was not left out of fast.c as it is: with clang, as root, run go test ./nft -run %s -timeout 1h -fast-path-mutations .", m.name, t.Name())
			}
		}
		return
	}
	need.TCX(t)
	only := regexp.MustCompile(*mutate)
	run := mutationRunner(t)
	var mu sync.Mutex                     // guards found
	t.Run("without", func(t *testing.T) { // returns when all have
		for _, m := range mutations {
			if !only.MatchString(m.name) {
				continue
			}
			t.Run(m.name, func(t *testing.T) {
				t.Parallel()
				began := time.Now()
				by, err := run(t.TempDir(), strings.Replace(string(source), m.from, m.to, 1))
				switch why := unmutable[m.name]; {
				case err != nil:
					t.Error(err)
				case by == "" && why == "":
					t.Error("no test fails")
				case by == "":
					by = "none, " + why
				}
				mu.Lock()
				defer mu.Unlock()
				found[m.name] = by
				// it takes long
				fmt.Fprintf(os.Stderr, "%s: %s (%v)\n", m.name, by, time.Since(began).Round(time.Second))
			})
		}
	})
	text := head
	for _, m := range mutations {
		if found[m.name] != "" {
			text += m.name + ": " + found[m.name] + "\n"
		}
	}
	if err := os.WriteFile(record, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// mutationRunner builds this package's tests with a fast path that reads its object from a file, and returns what
// compiles a source into a folder, runs them with that, and says which failed first; "": none.
func mutationRunner(t *testing.T) func(folder, source string) (failed string, err error) {
	t.Helper()
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(file(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path, err := filepath.Abs("../fastpath/path.go")
	if err != nil {
		t.Fatal(err)
	}
	loader, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const object = "EGRET_FAST_PATH_OBJECT"
	changed := string(loader)
	for _, change := range [][2]string{
		{"\t_ \"embed\" // the object\n", ""},
		{"\t\"net/netip\"\n", "\t\"net/netip\"\n\t\"os\"\n"},
		{"//go:embed fast.o\nvar object []byte\n", "var object, _ = os.ReadFile(os.Getenv(\"" + object + "\"))\n"},
	} {
		if strings.Count(changed, change[0]) != 1 {
			t.Fatalf("path.go does not have %q once", change[0])
		}
		changed = strings.Replace(changed, change[0], change[1], 1)
	}
	write("path.go", changed)
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {path: file("path.go")}})
	if err != nil {
		t.Fatal(err)
	}
	write("overlay.json", string(overlay))
	for _, args := range [][]string{
		{"test", "-c", "-vet=off", "-overlay", file("overlay.json"), "-o", file("nft.test"), "."},
		{"build", "-o", file("compile"), "../fastpath/generate.go"},
	} {
		if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
			t.Fatalf("go %v: %v\n%s", args, err, out)
		}
	}
	return func(folder, source string) (string, error) {
		code, compiled := filepath.Join(folder, "fast.c"), filepath.Join(folder, "fast.o")
		if err := os.WriteFile(code, []byte(source), 0o600); err != nil {
			return "", err
		}
		if out, err := exec.Command(file("compile"), code, compiled).CombinedOutput(); err != nil {
			return "", fmt.Errorf("compiling: %w\n%s", err, out)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		c := exec.CommandContext(ctx, file("nft.test"), "-test.run=^TestTheFastPath|TestWhatIsNoTCPFindsItsWayBack/.*fast", "-test.failfast", "-test.v")
		c.Env = append(os.Environ(), object+"="+compiled)
		out, err := c.CombinedOutput()
		var failed *exec.ExitError
		switch fail := regexp.MustCompile(`(?m)^--- FAIL: (\S+)`).FindSubmatch(out); {
		case err == nil:
			return "", nil
		case errors.As(err, &failed) && fail != nil && !strings.Contains(string(out), "loading the programs"):
			return string(fail[1]), nil
		}
		return "", fmt.Errorf("running: %w\n%s", err, out)
	}
}
