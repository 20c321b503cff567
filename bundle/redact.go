package bundle

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// redactor puts other names and addresses in place of those that there are. What stood for what is random for each
// archive, and written down nowhere.
//
// Addresses keep their structure: two that share the first n bits still do, so that subnets, ranges and pod CIDRs are
// told from each other. Those that mean the same everywhere, such as loopback addresses and Egret's own in the overlay,
// stay, and what is private stays private.
type redactor struct {
	key   []byte
	names map[string]string // name -> pseudonym
	first map[string]int    // how long the longest name is that begins so, up to the first dot, dash or underscore
	odd   []string          // those names that are of more than a name in Kubernetes is made of, the longest first
	count map[string]int    // pseudonyms, by the word that they begin with
	ips   map[netip.Addr]netip.Addr
}

// The words that pseudonyms begin with. No name in Kubernetes has capitals.
const (
	host      = "HOST"
	namespace = "NAMESPACE"
	pod       = "POD"
	person    = "PERSON"
	label     = "LABEL"
)

// words are those for the names in fields of records.
var words = map[string]string{
	"node": "NODE", "from": "NODE", "to": "NODE", "pool": "POOL", "egress": "EGRESS", "egresses": "EGRESS", "by": person,
}

// newRedactor reads the names that there are. Where it cannot know all of them it is an error: some would stay.
func newRedactor(ctx context.Context, c *store.Client, unreached error, hosts []string) (*redactor, error) {
	r := &redactor{key: make([]byte, 32), names: map[string]string{}, first: map[string]int{}, count: map[string]int{}, ips: map[netip.Addr]netip.Addr{}}
	_, _ = rand.Read(r.key) // it never fails
	fail := func(err error) error {
		return fmt.Errorf("--redact has to know all names, and cannot read them: %w; without --redact what else there is is collected", err)
	}
	if c == nil {
		return nil, fail(unreached)
	}
	for _, k := range kinds {
		err := k.each(ctx, c, func(rec record) error {
			var v any
			if rec.Value == nil {
				return r.unreadable(rec.Key)
			}
			if err := json.Unmarshal(rec.Value, &v); err != nil {
				return err
			}
			r.learn(k, v, "")
			return nil
		})
		if err != nil {
			return nil, fail(err)
		}
	}
	for _, h := range hosts {
		r.host(h)
	}
	if space, err := c.Space(ctx); err == nil { // else the archive does not have them either
		for _, m := range space.Members {
			r.host(m.Name)
			r.host(m.Endpoint)
		}
	}
	return r, nil
}

// unreadable learns what may be a name in the key of a record whose value is none.
func (r *redactor) unreadable(key string) error {
	_, rest, _ := strings.Cut(key, "/")
	for _, part := range strings.Split(rest, "/") {
		if part != "by-node" && part != "by-egress" {
			r.pseudonym(label, part)
		}
	}
	return nil
}

// host learns the name of a machine, or the one in an endpoint.
func (r *redactor) host(s string) {
	if u, err := url.Parse(s); err == nil && u.Host != "" {
		s = u.Host
	}
	if name, _, err := net.SplitHostPort(s); err == nil {
		s = name
	}
	if s != "localhost" && s != "default" { // etcd's name of a member that was given none
		r.pseudonym(host, s)
	}
}

// learn finds the names in a value of a record of a kind, which is in a field.
func (r *redactor) learn(k kind, v any, field string) {
	switch v := v.(type) {
	case string:
		switch ns, name, both := strings.Cut(v, "/"); {
		case field == "pod" && both:
			r.pseudonym(namespace, ns)
			r.pseudonym(pod, name)
		case k.file == "elections":
			r.host(v)
		case field == "name" && k.prefix == store.NodePrefix:
			r.pseudonym("NODE", v)
		case field == "name" && k.prefix == store.PoolPrefix:
			r.pseudonym("POOL", v)
		case field == "name" && k.prefix == store.EgressPrefix:
			r.pseudonym("EGRESS", v)
		case field == "labels" || field == "matchLabels" || field == "values" || field == "key":
			r.pseudonym(label, v)
		case k.file == "told" && field == "nodes":
			r.pseudonym("NODE", v)
		case words[field] != "":
			r.pseudonym(words[field], v)
		}
	case []any:
		for _, inner := range v {
			r.learn(k, inner, field)
		}
	case map[string]any:
		// in order: what stands for what is chance in no more than it has to be
		for _, key := range slices.Sorted(maps.Keys(v)) {
			inner := v[key]
			switch field {
			case "labels", "matchLabels":
				r.learn(k, key, "key")
				if !ofKubernetes(key) || key == "kubernetes.io/hostname" || strings.HasPrefix(key, "topology.kubernetes.io/") {
					r.learn(k, inner, field)
				}
			case "nodes":
				r.learn(k, inner, field)
			default:
				r.learn(k, inner, key)
			}
		}
	}
}

// ofKubernetes reports whether the key of a label is one that means the same everywhere.
func ofKubernetes(key string) bool {
	domain, _, _ := strings.Cut(key, "/")
	return strings.HasSuffix(domain, "kubernetes.io") || strings.HasSuffix(domain, "k8s.io")
}

// maxName is how long a name in Kubernetes may be.
const maxName = 253

// plainWord is what is no name, whoever uses it as one: it would make nonsense of all that it is in.
var plainWord = regexp.MustCompile(`^([0-9]{0,5}|[^\pL\pN]*|true|false)$`)

// pseudonym returns what stands for a name; it is made when the name is seen first. Addresses have theirs by address.
func (r *redactor) pseudonym(word, name string) string {
	if p := r.names[name]; p != "" {
		return p
	}
	if _, err := netip.ParseAddr(name); err == nil || plainWord.MatchString(name) || ofKubernetes(name) {
		return name
	}
	r.count[word]++
	r.names[name] = fmt.Sprintf("%s%d", word, r.count[word])
	if begin, _, _ := strings.Cut(strings.NewReplacer("_", ".", "-", ".").Replace(name), "."); len(name) <= maxName && run.FindString(name) == name {
		r.first[begin] = max(r.first[begin], len(name))
	} else {
		r.odd = append(r.odd, name)
		slices.SortFunc(r.odd, func(a, b string) int { return len(b) - len(a) })
	}
	return r.names[name]
}

var (
	// four is what may be an IPv4 address, and six what one of IPv6, or a MAC address, is among: whatever is before and
	// behind it, as in "node:fd10::11".
	four = regexp.MustCompile(`\d{1,3}(\.\d{1,3}){3}(/\d{1,3})?`)
	six  = regexp.MustCompile(`[0-9a-zA-Z]*:[0-9a-fA-F:]+(/\d{1,3}|\.\d)?`)
	// run is what names are made of, and what is between them.
	run = regexp.MustCompile(`[A-Za-z0-9][A-Za-z0-9._-]*`)
)

// text returns a text with all names and addresses replaced.
func (r *redactor) text(s string) string { return r.between(s, r.odd) }

// between replaces odd names, and what is before, between and behind them by itself: else a name beside one would be
// part of a longer run then.
func (r *redactor) between(s string, odd []string) string {
	for i, name := range odd {
		if parts := strings.Split(s, name); len(parts) > 1 {
			for j, part := range parts {
				parts[j] = r.between(part, odd[i+1:])
			}
			return strings.Join(parts, r.names[name])
		}
	}
	s = four.ReplaceAllStringFunc(s, func(s string) string {
		if is, ok := r.addressText(s); ok {
			return is
		}
		if ip, length, ok := strings.Cut(s, "/"); ok { // no length of a prefix
			ip, _ = r.addressText(ip)
			return ip + "/" + length
		}
		return s
	})
	s = six.ReplaceAllStringFunc(s, r.among)
	return run.ReplaceAllStringFunc(s, r.inRun)
}

// among replaces the address that is among colons and hexadecimal digits, from the first group on from which there is
// one.
func (r *redactor) among(s string) string {
	const most = 64 // an address and a length have 43 characters: what is longer, as a fingerprint, is none
	if len(s) > most || strings.HasPrefix(strings.ToLower(s), "::ffff:") && strings.Contains(s, ".") {
		return s // the second: it ends in an address of IPv4, which is replaced already
	}
	from := 0
	if word := strings.IndexByte(s, ':'); strings.Trim(s[:word], "0123456789abcdefABCDEF") != "" {
		from = word + 1
	}
	for {
		part := s[from:]
		for end := len(part); end > 0; {
			if is, ok := r.addressText(part[:end]); ok {
				return s[:from] + is + part[end:]
			}
			switch cut := part[:end]; { // a colon may follow, or what is no length of a prefix
			case strings.HasSuffix(cut, ":"):
				end--
			default:
				end = strings.LastIndexAny(cut, "/.")
			}
		}
		next := strings.IndexByte(part, ':')
		if next < 0 {
			return s
		}
		from += next + 1
	}
}

// inRun replaces the names in a run of letters, digits, dots, dashes and underscores: the longest first, from where one
// may begin to where one may end.
func (r *redactor) inRun(s string) string {
	var out strings.Builder
	for len(s) > 0 {
		next := strings.IndexAny(s, "._-")
		word := s
		if next >= 0 {
			word = s[:next]
		}
		end := min(r.first[word], len(s))
		for end > 0 && (r.names[s[:end]] == "" || end < len(s) && !strings.ContainsRune("._-", rune(s[end]))) {
			end = strings.LastIndexAny(s[:end], "._-")
		}
		switch {
		case end > 0:
			out.WriteString(r.names[s[:end]])
			s = s[end:]
		case next < 0:
			out.WriteString(s)
			s = ""
		default:
			out.WriteString(s[:next+1])
			s = s[next+1:]
		}
		if len(s) > 0 && strings.ContainsRune("._-", rune(s[0])) {
			out.WriteByte(s[0])
			s = s[1:]
		}
	}
	return out.String()
}

// addressText replaces an address, a prefix or a MAC address; ok is false for what is none of these.
func (r *redactor) addressText(s string) (is string, ok bool) {
	if mac, err := net.ParseMAC(s); err == nil {
		h := r.hash([]byte("mac"), mac)
		return net.HardwareAddr{0x02, h[0], h[1], h[2], h[3], h[4]}.String(), true
	}
	if p, err := netip.ParsePrefix(s); err == nil {
		masked := p == p.Masked()
		p = netip.PrefixFrom(r.address(p.Addr()), p.Bits())
		if masked {
			p = p.Masked()
		}
		return p.String(), true
	}
	if ip, err := netip.ParseAddr(s); err == nil {
		return r.address(ip).String(), true
	}
	return s, false
}

// shape is a prefix whose addresses stay within it.
type shape struct {
	netip.Prefix
	kept bool // nothing of them changes
}

var shapes = []shape{
	{netip.MustParsePrefix("127.0.0.0/8"), true}, {egress.OverlaySources4, true}, {netip.MustParsePrefix("224.0.0.0/3"), true}, {netip.MustParsePrefix("10.0.0.0/8"), false},
	{netip.MustParsePrefix("172.16.0.0/12"), false}, {netip.MustParsePrefix("192.168.0.0/16"), false}, {netip.MustParsePrefix("100.64.0.0/10"), false},
	{netip.MustParsePrefix("169.254.0.0/16"), false},
	{netip.MustParsePrefix("::/127"), true}, {egress.OverlaySources6, true}, {netip.MustParsePrefix("ff00::/8"), true}, {netip.MustParsePrefix("fc00::/7"), false},
	{netip.MustParsePrefix("fe80::/10"), false}, {netip.MustParsePrefix("2000::/3"), false},
}

// address returns the address that stands for one: bit by bit, each changed or not by what the key makes of those
// before it.
func (r *redactor) address(ip netip.Addr) netip.Addr {
	plain := ip.Unmap().WithZone("")
	if known, ok := r.ips[plain]; ok {
		return known
	}
	b, out := plain.AsSlice(), plain.AsSlice()
	for i := range plain.BitLen() {
		before, _ := plain.Prefix(i) // i is at most its length
		fixed := slices.ContainsFunc(shapes, func(s shape) bool {
			return s.Addr().Is4() == plain.Is4() && (i < s.Bits() && before.Contains(s.Addr()) || s.kept && i >= s.Bits() && s.Contains(plain))
		})
		if !fixed && r.hash([]byte{byte(i), byte(len(b))}, before.Addr().AsSlice())[0]&1 == 1 {
			out[i/8] ^= 0x80 >> (i % 8)
		}
	}
	a, _ := netip.AddrFromSlice(out)
	r.ips[plain] = a
	return a
}

func (r *redactor) hash(what ...[]byte) []byte {
	h := hmac.New(sha256.New, r.key)
	for _, b := range what {
		h.Write(b) // a Hash never fails
	}
	return h.Sum(nil)
}
