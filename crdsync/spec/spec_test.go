package spec

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
)

func read[T any](t *testing.T, text string) (out T) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(text), &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// pool returns the pool of ranges in short: "10.0.0.1-10.0.0.9, 10.0.1.0/28".
func pool(t *testing.T, name, ranges string) egress.Pool {
	t.Helper()
	var s v1beta1.ExternalIPPoolSpec
	for _, r := range strings.Split(ranges, ", ") {
		if start, end, ok := strings.Cut(r, "-"); ok {
			s.IPRanges = append(s.IPRanges, v1beta1.IPRange{Start: v1beta1.IP(start), End: v1beta1.IP(end)})
		} else if r != "" {
			s.IPRanges = append(s.IPRanges, v1beta1.IPRange{CIDR: r})
		}
	}
	p, err := Pool(name, s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// wantError wants an error that has all the parts, separated by |, or none.
func wantError(t *testing.T, err error, parts string) {
	t.Helper()
	if (err != nil) != (parts != "") {
		t.Fatalf("error %v, want %q", err, parts)
	}
	for _, part := range strings.Split(parts, "|") {
		if err != nil && !strings.Contains(err.Error(), part) {
			t.Errorf("error %v does not say %q", err, part)
		}
	}
}

func TestPoolByItself(t *testing.T) {
	for name, tt := range map[string]struct{ spec, err string }{
		"in order":                     {"{ipRanges: [{start: 10.0.0.1, end: 10.0.0.9}, {cidr: 10.0.1.0/28}]}", ""},
		"inverted":                     {"{ipRanges: [{cidr: 10.0.1.0/28}, {start: 10.0.0.9, end: 10.0.0.1}]}", "ipRanges[1]: start 10.0.0.9 is after end 10.0.0.1: want them the other way round"},
		"of two families":              {"{ipRanges: [{start: 10.0.0.9, end: 'fd00::1'}]}", "ipRanges[0]: start 10.0.0.9 and end fd00::1: want addresses of one family"},
		"overlapping by one address":   {"{ipRanges: [{start: 10.0.0.1, end: 10.0.0.5}, {start: 10.0.0.5, end: 10.0.0.9}]}", "ipRanges: 10.0.0.5-10.0.0.9 overlaps with 10.0.0.1-10.0.0.5 of the same pool"},
		"next to each other":           {"{ipRanges: [{start: 10.0.0.1, end: 10.0.0.4}, {start: 10.0.0.5, end: 10.0.0.9}]}", ""},
		"one inside of the other":      {"{ipRanges: [{start: 'fd00::5', end: 'fd00::5'}, {cidr: 'fd00::/64'}]}", "ipRanges: fd00::/64 overlaps with fd00::5-fd00::5 of the same pool"},
		"inside of the subnet":         {"{ipRanges: [{cidr: 10.0.0.0/24}], subnetInfo: {gateway: 10.0.0.1, prefixLength: 24}}", ""},
		"outside of the subnet":        {"{ipRanges: [{start: 10.0.0.250, end: 10.0.1.3}], subnetInfo: {gateway: 10.0.0.1, prefixLength: 24}}", "ipRanges: 10.0.0.250-10.0.1.3 is not inside of the pool's subnet: want addresses of 10.0.0.0/24"},
		"a gateway of another family":  {"{ipRanges: [{cidr: 10.0.0.0/24}], subnetInfo: {gateway: 'fd00::1', prefixLength: 64}}", "subnetInfo: gateway fd00::1 is not of the IP family of the range 10.0.0.0/24"},
		"a cidr outside of the subnet": {"{ipRanges: [{cidr: 10.0.1.7/28}], subnetInfo: {gateway: 10.0.0.1, prefixLength: 24}}", "ipRanges: 10.0.1.7/28 is not inside of the pool's subnet: want addresses of 10.0.0.0/24"},
		"written in a form of its own": {"{ipRanges: [{start: 'FD00:0::5', end: 'FD00:0::6'}, {cidr: 'FD00:0::/64'}]}", "ipRanges: FD00:0::/64 overlaps with FD00:0::5-FD00:0::6 of the same pool"},
		"mapped into IPv6":             {"{ipRanges: [{start: '::ffff:10.0.0.9', end: 10.0.0.1}]}", "ipRanges[0]: start ::ffff:10.0.0.9 is after end 10.0.0.1: want them the other way round"},
		"a start that is none":         {"{ipRanges: [{start: here, end: 10.0.0.1}]}", `ipRanges[0]: start "here": want an IPv4 or IPv6 address`},
		"a start without an end":       {"{ipRanges: [{start: 10.0.0.1}]}", `ipRanges[0]: start "10.0.0.1" without an end: want a cidr, or a start and an end`},
		"neither":                      {"{ipRanges: [{}]}", "ipRanges[0]: neither cidr nor start and end: want a cidr, or a start and an end"},
		"a VLAN and a prefix":          {"{subnetInfo: {gateway: 10.0.0.1, prefixLength: 64, vlan: 5000}}", "subnetInfo: prefixLength 64: want 1 to 31, as the gateway is 10.0.0.1|subnetInfo: vlan 5000: want 1 to 4094, or 0 for none"},
		"a prefix of another family":   {"{subnetInfo: {gateway: 10.0.0.1, prefixLength: 64}}", "subnetInfo: prefixLength 64: want 1 to 31, as the gateway is 10.0.0.1"},
		"a prefix that is all of IPv6": {"{subnetInfo: {gateway: 'fd00::1', prefixLength: 128}}", "prefixLength 128: want 1 to 127"},
		"loopback":                     {"{ipRanges: [{cidr: 127.0.0.0/8}]}", "ipRanges[0]: cidr 127.0.0.0/8: want unicast addresses, neither loopback nor link-local"},
		"link-local":                   {"{ipRanges: [{start: 'fe80::1', end: 'fe80::9'}]}", "ipRanges[0]: start fe80::1: want a unicast address"},
		"up to the broadcast address":  {"{ipRanges: [{start: 223.0.0.1, end: 255.255.255.255}]}", "ipRanges[0]: end 255.255.255.255: want a unicast address"},
		"several faults": {
			"{ipRanges: [{cidr: here}], subnetInfo: {gateway: there, prefixLength: 24, vlan: 5000}, nodeSelector: {matchLabels: {'a b': c}}}",
			`ipRanges[0]: cidr "here"|subnetInfo: gateway "there"|subnetInfo: vlan 5000|nodeSelector.matchLabels: key "a b": want the name of a label`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Pool("p", read[v1beta1.ExternalIPPoolSpec](t, tt.spec))
			wantError(t, err, tt.err)
		})
	}
}

// What comes to the webhook need not have passed the CRDs' schema: eight megabytes of ranges would take minutes to be
// compared with each other.
func TestMoreThanTheSchemaAllowsIsRefusedAtOnce(t *testing.T) {
	begun := time.Now()
	var p v1beta1.ExternalIPPoolSpec
	var e v1beta1.EgressSpec
	for i := range 350_000 {
		text := v1beta1.IP(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).String())
		p.IPRanges = append(p.IPRanges, v1beta1.IPRange{Start: text, End: text})
		e.EgressIPs, e.ExternalIPPools = append(e.EgressIPs, text), append(e.ExternalIPPools, string(text))
	}
	if _, err := Pool("p", p); err == nil || !strings.Contains(err.Error(), "350000 ranges: want 1000 at most") {
		t.Errorf("a pool: %v", err)
	}
	if _, _, err := Addresses(e); err == nil || !strings.Contains(err.Error(), "350000") {
		t.Errorf("an egress: %v", err)
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestPoolBesideOthers(t *testing.T) {
	others := map[string]egress.Pool{
		"p": pool(t, "p", "10.0.0.1-10.0.0.255"), "q": pool(t, "q", "10.0.1.1-10.0.1.9, 10.0.1.11-10.0.1.20"), "r": pool(t, "r", "fd00::1-fd00::9"),
		"s": pool(t, "s", "10.0.3.0/28"),
	}
	for name, tt := range map[string]struct{ ranges, err string }{
		"itself":               {"10.0.0.1-10.0.0.255", ""},
		"between two ranges":   {"10.0.1.10-10.0.1.10", ""},
		"the last address":     {"10.0.1.20-10.0.1.30", "ipRanges: 10.0.1.20-10.0.1.30 overlaps with 10.0.1.11-10.0.1.20 of pool q: want each address in one pool"},
		"all of them":          {"10.0.0.0/16", "ipRanges: 10.0.0.0/16 overlaps with 10.0.1.1-10.0.1.9 of pool q|10.0.1.11-10.0.1.20 of pool q"},
		"of the other family":  {"fd00::9-fd00::a", "of pool r"},
		"the same by its bits": {"::a00:101-::a00:109", ""},
		"a cidr of a cidr":     {"10.0.3.0/30", "ipRanges: 10.0.3.0/30 overlaps with 10.0.3.0/28 of pool s: want each address in one pool"},
	} {
		t.Run(name, func(t *testing.T) { wantError(t, Overlap(pool(t, "p", tt.ranges), others), tt.err) })
	}
}

func TestRangesInUseStay(t *testing.T) {
	from := pool(t, "p", "10.0.0.1-10.0.0.9, 10.0.1.1-10.0.1.6")
	inUse := []egress.Allocation{
		{IP: netip.MustParseAddr("10.0.0.5"), Pool: "p", Egresses: []string{"web"}}, {IP: netip.MustParseAddr("10.0.1.3"), Pool: "q", Egresses: []string{"other"}},
	}
	for name, tt := range map[string]struct{ to, err string }{
		"unchanged":                  {"10.0.0.1-10.0.0.9, 10.0.1.1-10.0.1.6", ""},
		"in another order":           {"10.0.1.1-10.0.1.6, 10.0.0.1-10.0.0.9", ""},
		"the same written otherwise": {"10.0.1.0/29, 10.0.0.1-10.0.0.4, 10.0.0.5-10.0.0.9", ""},
		"without one in use":         {"10.0.1.1-10.0.1.6", "ipRanges: 10.0.0.5 is in use by egress web: want its range 10.0.0.1-10.0.0.9 kept"},
		"without an unused one":      {"10.0.0.1-10.0.0.9", ""},
		"shrunk around the address":  {"10.0.0.5-10.0.0.5", ""},
		"nothing":                    {"", "10.0.0.5 is in use"},
	} {
		t.Run(name, func(t *testing.T) { wantError(t, TakenAway(from, pool(t, "p", tt.to), inUse), tt.err) })
	}
	t.Run("a cidr", func(t *testing.T) {
		wantError(t, TakenAway(pool(t, "p", "10.0.0.0/28"), pool(t, "p", "10.0.0.8/29"), inUse),
			"ipRanges: 10.0.0.5 is in use by egress web: want its range 10.0.0.0/28 kept, or the egress moved to another pool first")
	})
	t.Run("the address becomes the gateway", func(t *testing.T) {
		to := from
		to.Subnet = &egress.Subnet{Gateway: inUse[0].IP, PrefixLength: 16}
		wantError(t, TakenAway(from, to, inUse), "subnetInfo: gateway 10.0.0.5 is in use by egress web: want another gateway")
	})
}

func TestAddressOfAPool(t *testing.T) {
	p, q := pool(t, "p", "10.0.0.1-10.0.0.9"), pool(t, "q", "fd00::1-fd00::9")
	p.Subnet = &egress.Subnet{Gateway: netip.MustParseAddr("10.0.0.1"), PrefixLength: 24}
	pools := map[string]egress.Pool{"p": p, "q": q, "c": pool(t, "c", "10.0.1.0/28, 10.0.2.0/28, fd00:1::/64")}
	for name, tt := range map[string]struct{ ip, pools, want, err string }{
		"static":              {"192.0.2.1", "", "", ""},
		"of the pool":         {"10.0.0.9", "p", "p", ""},
		"of the second":       {"FD00:0::1", "p q", "q", ""},
		"of none":             {"10.0.0.10", "p q", "", "egressIP 10.0.0.10 is not an address of pool p or q: want one of 10.0.0.1-10.0.0.9, fd00::1-fd00::9"},
		"the gateway":         {"10.0.0.1", "p", "", "this one is the gateway"},
		"of a pool to come":   {"10.0.0.1", "none", "", "pool none does not exist"},
		"of none of a cidr":   {"10.0.9.9", "c", "", "egressIP 10.0.9.9 is not an address of pool c: want one of 10.0.1.0/28, 10.0.2.0/28, fd00:1::/64"},
		"the first of a cidr": {"10.0.2.0", "c", "", "egressIP 10.0.2.0 is not an address of pool c: want one of 10.0.1.0/28, 10.0.2.0/28 (10.0.2.1-10.0.2.14), fd00:1::/64"},
		"the last of a cidr":  {"10.0.1.15", "c", "", "want one of 10.0.1.0/28 (10.0.1.1-10.0.1.14), 10.0.2.0/28, fd00:1::/64"},
		"of one of them, so":  {"10.0.0.9", "none p", "p", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := PoolOf(netip.MustParseAddr(tt.ip), strings.Fields(tt.pools), pools)
			wantError(t, err, tt.err)
			if got != tt.want {
				t.Errorf("got pool %q, want %q", got, tt.want)
			}
		})
	}
}

func TestPoolsOfOneFamily(t *testing.T) {
	pools := map[string]egress.Pool{
		"p": pool(t, "p", "10.0.0.1-10.0.0.9"), "q": pool(t, "q", "10.0.1.0/28"), "six": pool(t, "six", "fd00::/64"),
		"both": pool(t, "both", "fd01::/64, 10.0.2.0/28"), "empty": pool(t, "empty", ""),
	}
	for names, err := range map[string]string{
		"p q": "externalIPPools p and q are of one IP family", "p six": "", "p both": "", "both q": "", "p none": "", "p empty": "", "p": "",
	} {
		t.Run(names, func(t *testing.T) { wantError(t, Families(strings.Fields(names), pools), err) })
	}
}

func TestSelectors(t *testing.T) {
	for name, tt := range map[string]struct{ applied, err string }{
		"of both kinds": {"{podSelector: {matchLabels: {app.kubernetes.io/name: '', a: B-c_d.e}}, namespaceSelector: {matchExpressions: [{key: a, operator: NotIn, values: [b, '']}]}}", ""},
		"a key":         {"{podSelector: {matchLabels: {ok: b, 'a b': c}}}", `appliedTo.podSelector.matchLabels: key "a b": want the name of a label, like app or example.com/app`},
		"two prefixes":  {"{namespaceSelector: {matchLabels: {a/b/c: d}}}", `appliedTo.namespaceSelector.matchLabels: key "a/b/c": want`},
		"a value":       {"{podSelector: {matchLabels: {a: 'b c'}}}", `appliedTo.podSelector.matchLabels[a]: value "b c": want at most 63 letters, digits, - _ and .`},
		"an expression": {
			"{podSelector: {matchExpressions: [{key: ok, operator: Exists}, {key: -a, operator: In, values: [b, -c]}]}}",
			`appliedTo.podSelector.matchExpressions[1]: key "-a": want the name|matchExpressions[1]: value "-c": want at most 63`,
		},
		"its operator": {"{podSelector: {matchExpressions: [{key: a, operator: Near}]}}", `matchExpressions[0]: operator "Near": want In, NotIn, Exists or DoesNotExist`},
		"no values":    {"{podSelector: {matchExpressions: [{key: a, operator: In}]}}", "matchExpressions[0]: operator In without values: want one at least"},
		"values":       {"{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}", `matchExpressions[0]: operator Exists with values ["b"]: want none`},
		"all of them":  {"{podSelector: {matchLabels: {'a b': c}}, namespaceSelector: {matchLabels: {'d e': f}}}", `podSelector.matchLabels: key "a b"|namespaceSelector.matchLabels: key "d e"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := AppliedTo(read[v1beta1.AppliedTo](t, tt.applied))
			wantError(t, err, tt.err)
		})
	}
}

func TestBandwidth(t *testing.T) {
	for name, tt := range map[string]struct {
		rate, burst v1beta1.Quantity
		want        egress.Bandwidth
		err         string
	}{
		"decimal":                  {"300k", "2G", egress.Bandwidth{Rate: 300e3, Burst: 2e9}, ""},
		"binary":                   {"1Ki", "9223372036854775807", egress.Bandwidth{Rate: 1024, Burst: 9223372036854775807}, ""},
		"fractions that are whole": {"0.5G", "1.5e3", egress.Bandwidth{Rate: 500e6, Burst: 1500}, ""},
		"thousandths":              {"100m", "1500m", egress.Bandwidth{}, `bandwidth rate "100m": want no thousandths: 100m is a tenth, 100M a hundred million|burst "1500m"`},
		"no quantities":            {"fast", "", egress.Bandwidth{}, `bandwidth rate "fast": want a quantity above 0|bandwidth burst ""`},
		"not positive":             {"0", "-1k", egress.Bandwidth{}, `rate "0"|burst "-1k"`},
		"too large":                {"9223372036854775808", "100E", egress.Bandwidth{}, `rate "9223372036854775808"|burst "100E"`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Bandwidth(&v1beta1.Bandwidth{Rate: tt.rate, Burst: tt.burst})
			wantError(t, err, tt.err)
			if err == nil && *got != tt.want {
				t.Errorf("got %v, want %v", *got, tt.want)
			}
		})
	}
}

func TestAddresses(t *testing.T) {
	for name, tt := range map[string]struct{ spec, err string }{
		"both families":     {"{egressIPs: [10.0.0.1, 'fd00::1']}", ""},
		"twice":             {"{egressIPs: [10.0.0.1, '::ffff:10.0.0.1']}", ""},
		"two of one family": {"{egressIPs: [10.0.0.1, '::ffff:10.0.0.2']}", "egressIPs 10.0.0.1 and ::ffff:10.0.0.2: want at most one of each IP family"},
		"loopback":          {"{egressIP: '::ffff:127.0.0.1'}", "egressIP ::ffff:127.0.0.1: want a unicast address, neither loopback nor link-local"},
		"none":              {"{egressIP: here}", `egressIP "here": want an IPv4 or IPv6 address`},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := Addresses(read[v1beta1.EgressSpec](t, tt.spec))
			wantError(t, err, tt.err)
		})
	}
}

// A range that is written anew in other words is none that is added.
func TestARangeInOtherWordsIsNotAdded(t *testing.T) {
	from := pool(t, "p", "10.0.0.0/28, 10.0.1.1-10.0.1.6")
	if got := Added(from, pool(t, "p", "10.0.1.0/29, 10.0.0.1-10.0.0.14, 10.0.2.0/30")); len(got.Ranges) != 1 || got.Ranges[0].String() != "10.0.2.0/30" {
		t.Errorf("added %v, want 10.0.2.0/30", got.Ranges)
	}
}
