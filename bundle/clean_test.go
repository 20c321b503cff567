package bundle

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func secretsRedactor(names map[string]string) *redactor {
	r := &redactor{key: []byte("a key"), names: map[string]string{}, first: map[string]int{}, count: map[string]int{}, ips: map[netip.Addr]netip.Addr{}}
	for _, name := range []string{"node-1", "node-10", "web", "web-1", "prod", "public", "alice@laptop (certificate CN=alice)", "node-1.example.com", " ", " (CN=bob)"} {
		if word := names[name]; word != "" {
			r.pseudonym(word, name)
		}
	}
	return r
}

func TestNamesAreReplacedWholeAndEverywhere(t *testing.T) {
	r := secretsRedactor(map[string]string{"node-1": "NODE", "node-10": "NODE", "web": "EGRESS", "web-1": pod, "prod": namespace, "public": "POOL",
		"alice@laptop (certificate CN=alice)": person, "node-1.example.com": host, " ": person, " (CN=bob)": person})
	for in, want := range map[string]string{
		"egress web: no node":                                  "egress EGRESS1: no node",
		"node-1's agent":                                       "NODE1's agent",
		"node-10, node-1":                                      "NODE2, NODE1",
		"prod/web-1 on node-1.":                                "NAMESPACE1/POD1 on NODE1.",
		"members/by-node/node-1/web":                           "members/by-node/NODE1/EGRESS1",
		"acts/20260102T150405.000000000-cordon-node-10":        "acts/20260102T150405.000000000-cordon-NODE2",
		"https://node-1.example.com:2379":                      "https://HOST1:2379",
		"pinned by alice@laptop (certificate CN=alice) at 9":   "pinned by PERSON1 at 9",
		"on node-1 (CN=bob)":                                   "on NODE1PERSON2",
		"webs and the website are words":                       "webs and the website are words",
		"at 12:03:04, 1.5s, v1.36.3, 6.12.95":                  "at 12:03:04, 1.5s, v1.36.3, 6.12.95",
		`egret_egress_ip_owned{pool="public",node="node-1"} 1`: `egret_egress_ip_owned{pool="POOL1",node="NODE1"} 1`,
		"node-1-web_web.web":                                   "NODE1-EGRESS1_EGRESS1.EGRESS1",
		"":                                                     "",
	} {
		if got := r.text(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestAddressesAreReplacedAndKeepTheirStructure(t *testing.T) {
	r := secretsRedactor(nil)
	a := netip.MustParseAddr
	seen := map[netip.Addr]netip.Addr{}
	random := rand.New(rand.NewPCG(1, 2))
	list := []netip.Addr{a("10.10.0.11"), a("10.10.0.12"), a("10.244.0.1"), a("192.168.1.1"), a("172.16.3.4"), a("172.32.0.1"), a("100.64.0.1"), a("203.0.113.7"), a("0.0.0.1"), a("fd10::11"),
		a("fd10::12"), a("2001:db8::1"), a("fe80::1"), a("::1"), a("255.255.255.255"), a("8.8.8.8"), a("169.254.1.1")}
	for range 40 {
		list = append(list, netip.AddrFrom4([4]byte{byte(random.Uint32()), byte(random.Uint32()), byte(random.Uint32()), byte(random.Uint32())}))
	}
	for _, ip := range list {
		seen[ip] = r.address(ip)
		if again := r.address(ip); again != seen[ip] {
			t.Errorf("%s is %s and then %s", ip, seen[ip], again)
		}
	}
	common := func(x, y netip.Addr) int {
		for n := x.BitLen(); n > 0; n-- {
			if p, _ := x.Prefix(n); p.Contains(y) {
				return n
			}
		}
		return 0
	}
	back := map[netip.Addr]netip.Addr{}
	for x, as := range seen {
		if was, taken := back[as]; taken && was != x {
			t.Errorf("%s and %s are both %s", was, x, as)
		}
		back[as] = x
		for y, ys := range seen {
			if x.Is4() == y.Is4() && common(x, y) != common(as, ys) {
				t.Errorf("%s and %s share %d bits, %s and %s share %d", x, y, common(x, y), as, ys, common(as, ys))
			}
		}
		for _, p := range []string{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16", "fc00::/7", "fe80::/10", "224.0.0.0/3"} {
			if p := netip.MustParsePrefix(p); p.Contains(x) != p.Contains(as) {
				t.Errorf("%s is %s: one of them alone is of %s", x, as, p)
			}
		}
	}
	for _, kept := range []string{"0.0.0.1", "::1", "255.255.255.255"} {
		if seen[a(kept)] != a(kept) {
			t.Errorf("%s, which means the same everywhere, is %s", kept, seen[a(kept)])
		}
	}
	net, in := r.text("10.244.0.0/24"), r.text("10.244.0.77")
	if p, err := netip.ParsePrefix(net); err != nil || p != p.Masked() || !p.Contains(a(in)) || net == "10.244.0.0/24" {
		t.Errorf("10.244.0.0/24 is %s, 10.244.0.77 in it %s", net, in)
	}
	for _, form := range []string{"%s", "%s:8479", "[%s]:8479", "%s-%s", "%s/32", "%s.", "ip=%s,", `"%s"`, "%s: it waits", "%s ", "node:%s", "e:%s", "source:%s:", "%s_x", "%s/999", "%s.443", "(%s)", "address=%s;%s"} {
		for _, ip := range []string{"10.10.0.11", "fd10::11"} {
			if strings.Contains(ip, ":") && (form == "%s:8479" || form == "e:%s") || form == "%s.443" && !strings.Contains(ip, ":") {
				continue // it is another address
			}
			in := strings.ReplaceAll(form, "%s", ip)
			if got, want := r.text(in), strings.ReplaceAll(form, "%s", seen[a(ip)].String()); got != want {
				t.Errorf("%s: %s, want %s", in, got, want)
			}
		}
	}
	for in, want := range map[string]string{"::ffff:10.10.0.11": "::ffff:" + seen[a("10.10.0.11")].String(), "10:20:30, a:b": "10:20:30, a:b", "::": "::", "a::/": "",
		strings.Repeat(":", 1<<16): strings.Repeat(":", 1<<16), strings.Repeat("a-", 1<<16): strings.Repeat("a-", 1<<16)} {
		if got := r.text(in); want != "" && got != want {
			t.Errorf("%.50s: %.50s, want %.50s", in, got, want)
		}
	}
	// The overlay's MAC address of a node is a hash of its IP, which whoever tries some finds.
	if got := r.text("mac 02:e9:11:22:33:44 dev eth0"); strings.Contains(got, "11:22:33") || !strings.HasPrefix(got, "mac 02:") {
		t.Errorf("a MAC address: %s", got)
	}
}

func TestSecretsDoNotPass(t *testing.T) {
	pem := "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIB\n-----END EC PRIVATE KEY-----"
	c := cleaner{hide: []string{"hunter22", ""}}
	for in, want := range map[string]string{
		"user root, password hunter22!":    "user root, password (hidden)!",
		"a\n" + pem + "\nb":                "a\n(a private key)\nb",
		"-----BEGIN PRIVATE KEY-----\nMHc": "(a private key)",
		"red \x1b[31malert\x07":            "red ?[31malert?",
		"\xff":                             "?",
		"tab\tand\nline":                   "tab\tand\nline",
	} {
		if got := c.text(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	data, err := c.data(lines, []byte(`{"value":{"why":"hunter22 `+strings.ReplaceAll(pem, "\n", `\n`)+`","n":12345678901234567890,"a":"\u001b<&>"}}`+"\n"+`{"value":["hunter22"]}`+"\n"+`{"val`))
	want := `{"value":{"a":"?<&>","n":12345678901234567890,"why":"(hidden) (a private key)"}}` + "\n" + `{"value":["(hidden)"]}` + "\n"
	if string(data) != want || err == nil {
		t.Errorf("%s, %v; want\n%s and an error about the rest", data, err, want)
	}
}

func TestWhatIsNoFieldOfARecordIsLeftOut(t *testing.T) {
	for _, tt := range []struct{ kind, value, want, note string }{
		{"pins", `{"ip":"10.0.0.1","node":"n"}`, `{"ip":"10.0.0.1","node":"n"}`, ""},
		{"pins", `{"ip":"10.0.0.1","node":"n","password":"hunter22"}`, `{"ip":"10.0.0.1","node":"n"}`, "does not know"},
		{"pins", `{"ip":"hunter22","node":"n"}`, ``, "no such record"},
		{"pins", `hunter22`, ``, "no such record"},
		{"elections", "crdsync-1", `"crdsync-1"`, ""},
		{"elections", strings.Repeat("x", 300), ``, "no name"},
		{"counters", `{"last":7}`, `{"last":7}`, ""},
	} {
		i := slices.IndexFunc(kinds, func(k kind) bool { return k.file == tt.kind })
		got, err := kinds[i].decode([]byte(tt.value))
		note := ""
		if err != nil {
			note = err.Error()
		}
		if string(got) != tt.want || (note == "") != (tt.note == "") || !strings.Contains(note, tt.note) || strings.Contains(note, "hunter22") {
			t.Errorf("%s %s: %s, %q; want %s, %q", tt.kind, tt.value, got, note, tt.want, tt.note)
		}
	}
}

// A kind of records that is added to the store has to be collected, and somebody has to have thought about what is in
// it.
func TestEveryKindOfRecordIsCollected(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../store/keys.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, d := range file.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, s := range g.Specs {
			for _, v := range s.(*ast.ValueSpec).Values {
				key, err := strconv.Unquote(v.(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				found++
				if !slices.ContainsFunc(kinds, func(k kind) bool { return k.prefix == key || k.prefix == key+"/" }) {
					t.Errorf("what is below %q is not collected: enter it in kinds, with the type that says what of it may be told", key)
				}
			}
		}
	}
	if found < 20 {
		t.Errorf("%d keys in store/keys.go: it is not read as it is written", found)
	}
}

func TestAFileIsCutAndSaysSo(t *testing.T) {
	var l limited
	for range 3 {
		n, err := l.Write(bytes.Repeat([]byte("x"), maxFile/2))
		if n != maxFile/2 || err != nil {
			t.Fatal(n, err)
		}
	}
	if l.data.Len() != maxFile || !l.cut {
		t.Errorf("%d bytes, cut: %t", l.data.Len(), l.cut)
	}
}
