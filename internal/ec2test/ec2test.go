package ec2test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// What clients are to use.
const (
	Region = "test-1"
	VPC    = "vpc-1"
)

// Credentials are the ones that it knows.
var Credentials = aws.CredentialsProviderFunc(credentials)

// Call is a request as it came.
type Call struct {
	Action, Interface string
	IPs               []netip.Addr // that are changed, or asked for
	Move              bool
}

// Fault is what goes wrong with a request. The zero Fault: nothing.
type Fault struct {
	Delay    time.Duration // before anything is done
	Throttle bool
	Lose     bool   // it is done, and the connection ends without an answer
	Late     *Late  // the connection ends at once, and it is done later
	Code     string // it is answered with this error, and not done
}

// Late is when a request is done: after Do is closed. Done is closed then.
type Late struct{ Do, Done chan struct{} }

// Server is the fake. Its methods are safe for concurrent use.
type Server struct {
	URL string

	t      testing.TB
	late   sync.WaitGroup
	mu     sync.Mutex // guards what follows
	ifaces map[string]*iface
	calls  []Call
	fault  func(Call) Fault
	worst  int // how many interfaces an address has had at a time
	lax    bool
}

type iface struct {
	subnets []netip.Prefix
	own     []netip.Addr // which stay
	more    map[netip.Addr]bool
	limit   int
	vpc     string
}

// New starts a fake that ends with the test.
func New(t testing.TB) *Server {
	s := &Server{t: t, ifaces: map[string]*iface{}, fault: func(Call) Fault { return Fault{} }}
	h := httptest.NewServer(s)
	s.URL = h.URL
	t.Cleanup(func() { h.Close(); s.late.Wait() })
	return s
}

// Add makes an interface of the VPC, with addresses of its own, in their subnets (/24 and /64), and room for so many
// more of each family.
func (s *Server) Add(id string, limit int, own ...string) {
	i := &iface{more: map[netip.Addr]bool{}, limit: limit, vpc: VPC}
	for _, text := range own {
		ip := netip.MustParseAddr(text)
		bits := 64
		if ip.Is4() {
			bits = 24
		}
		p, _ := ip.Prefix(bits)
		i.own, i.subnets = append(i.own, ip), append(i.subnets, p)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ifaces[id] = i
}

// Remove deletes an interface, as when its instance is terminated.
func (s *Server) Remove(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.ifaces, id)
}

// Fault has f say what goes wrong with each request from now on.
func (s *Server) Fault(f func(Call) Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Put gives an address to an interface past the API, as somebody else; with an empty one it takes it from whoever has
// it.
func (s *Server) Put(ip netip.Addr, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range s.ifaces {
		delete(i.more, ip)
	}
	if id != "" {
		s.ifaces[id].more[ip] = true
	}
}

// Lax has it take an IPv6 address for a second interface, which EC2 refuses: so Worst tells whether that was asked for.
func (s *Server) Lax() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lax = true
}

// Holder returns the interface that has an address.
func (s *Server) Holder(ip netip.Addr) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holder(ip)
}

// Calls returns the requests since it was called last.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := s.calls
	s.calls = nil
	return calls
}

// Worst returns the largest number of interfaces that an address has had at a time.
func (s *Server) Worst() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.worst
}

func (s *Server) holder(ip netip.Addr) (id string) {
	n := 0
	for name, i := range s.ifaces {
		if i.more[ip] || slices.Contains(i.own, ip) {
			id = name
			n++
		}
	}
	s.worst = max(s.worst, n)
	return id
}

// ServeHTTP answers a request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client is gone
	}
	asked, err := url.ParseQuery(string(body))
	if err != nil || !signed(r, body) {
		refuse(w, http.StatusForbidden, "AuthFailure", "not signed by a known key")
		return
	}
	c := Call{Action: asked.Get("Action"), Interface: asked.Get("NetworkInterfaceId"), Move: asked.Get("AllowReassignment") == "true"}
	for _, name := range []string{"PrivateIpAddress", "Ipv6Addresses", "Filter.2.Value"} {
		for n := 1; asked.Has(fmt.Sprintf("%s.%d", name, n)); n++ {
			ip, err := netip.ParseAddr(asked.Get(fmt.Sprintf("%s.%d", name, n)))
			if err != nil {
				refuse(w, http.StatusBadRequest, "InvalidParameterValue", err.Error())
				return
			}
			c.IPs = append(c.IPs, ip)
		}
	}
	s.mu.Lock()
	s.calls = append(s.calls, c)
	f := s.fault(c)
	s.mu.Unlock()
	time.Sleep(f.Delay)
	switch {
	case f.Throttle:
		refuse(w, http.StatusServiceUnavailable, "RequestLimitExceeded", "Request limit exceeded.")
	case f.Code != "":
		refuse(w, http.StatusBadRequest, f.Code, "as the test has it")
	case f.Late != nil:
		s.late.Go(func() { <-f.Late.Do; s.do(c, asked); close(f.Late.Done) })
		panic(http.ErrAbortHandler)
	default:
		answer, code, text := s.do(c, asked)
		if f.Lose {
			panic(http.ErrAbortHandler)
		}
		if code != "" {
			refuse(w, http.StatusBadRequest, code, text)
			return
		}
		fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?>`+"\n"+`<%[1]sResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>1</requestId>%[2]s</%[1]sResponse>`, c.Action, answer)
	}
}

func refuse(w http.ResponseWriter, status int, code, text string) {
	w.WriteHeader(status)
	fmt.Fprintf(w, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Response><Errors><Error><Code>%s</Code><Message>", code)
	_ = xml.EscapeText(w, []byte(text)) // the client is gone
	fmt.Fprint(w, "</Message></Error></Errors><RequestID>1</RequestID></Response>")
}

// do does what is asked for, and returns the answer, or the error's code and text.
func (s *Server) do(c Call, asked url.Values) (answer, code, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.Action == "DescribeNetworkInterfaces" {
		return s.describe(asked)
	}
	i := s.ifaces[c.Interface]
	if i == nil {
		return "", "InvalidNetworkInterfaceID.NotFound", "The networkInterface ID '" + c.Interface + "' does not exist"
	}
	switch c.Action {
	case "UnassignPrivateIpAddresses", "UnassignIpv6Addresses":
		for _, ip := range c.IPs {
			if !i.more[ip] {
				return "", "InvalidParameterValue", "Some of the specified addresses are not assigned to interface " + c.Interface
			}
		}
		for _, ip := range c.IPs {
			delete(i.more, ip)
		}
	case "AssignPrivateIpAddresses", "AssignIpv6Addresses":
		if code, text := s.assignable(c, i); code != "" {
			return "", code, text
		}
		for _, ip := range c.IPs {
			if h := s.holder(ip); h != "" && (ip.Is4() || !s.lax) {
				delete(s.ifaces[h].more, ip)
			}
			i.more[ip] = true
			s.holder(ip)
		}
	default:
		return "", "InvalidAction", c.Action
	}
	return "<return>true</return>", "", ""
}

func (s *Server) assignable(c Call, i *iface) (code, text string) {
	n := map[bool]int{}
	for ip := range i.more {
		n[ip.Is4()]++
	}
	for _, ip := range c.IPs {
		h := s.holder(ip)
		switch {
		case ip.Is4() != (c.Action == "AssignPrivateIpAddresses"):
			return "InvalidParameterValue", "Invalid value '" + ip.String() + "'"
		case !slices.ContainsFunc(i.subnets, func(p netip.Prefix) bool { return p.Contains(ip) }):
			return "InvalidParameterValue", "Address " + ip.String() + " does not fall within the subnet's address range"
		case h != "" && (slices.Contains(s.ifaces[h].own, ip) || h != c.Interface && !c.Move && (ip.Is4() || !s.lax)):
			return "InvalidParameterValue", "[" + ip.String() + "] assigned, but move is not allowed."
		case h != c.Interface:
			n[ip.Is4()]++
		}
		if n[ip.Is4()] > i.limit {
			return "PrivateIpAddressLimitExceeded", "Number of private addresses will exceed limit."
		}
	}
	return "", ""
}

func (s *Server) describe(asked url.Values) (answer, code, text string) {
	if asked.Get("Filter.1.Name") != "vpc-id" || asked.Get("Filter.1.Value.1") == "" {
		return "", "InvalidParameterValue", "the fake wants the filter vpc-id first"
	}
	var is4 bool
	switch name := asked.Get("Filter.2.Name"); name {
	case "addresses.private-ip-address":
		is4 = true
	case "ipv6-addresses.ipv6-address":
	default:
		return "", "InvalidParameterValue", "The filter '" + name + "' is invalid"
	}
	wanted := map[netip.Addr]bool{}
	for n := 1; asked.Has(fmt.Sprintf("Filter.2.Value.%d", n)); n++ {
		if n > 200 {
			return "", "FilterLimitExceeded", "The maximum number of filter values is 200"
		}
		if ip, err := netip.ParseAddr(asked.Get(fmt.Sprintf("Filter.2.Value.%d", n))); err == nil && ip.Is4() == is4 {
			wanted[ip] = true
		}
	}
	var b strings.Builder
	b.WriteString("<networkInterfaceSet>")
	from, next := asked.Get("NextToken"), ""
	shown := 0
	for _, id := range slices.Sorted(maps.Keys(s.ifaces)) {
		i := s.ifaces[id]
		all := append(slices.Clone(i.own), slices.Collect(maps.Keys(i.more))...)
		if i.vpc != asked.Get("Filter.1.Value.1") || id <= from || !slices.ContainsFunc(all, func(ip netip.Addr) bool { return wanted[ip] }) {
			continue
		}
		// EC2 may show fewer than were asked for: whoever reads the first page alone is found out
		if shown++; shown > 3 {
			break
		}
		next = id
		var v4, v6 strings.Builder
		for _, ip := range all {
			if ip.Is4() {
				fmt.Fprintf(&v4, "<item><primary>%t</primary><privateIpAddress>%s</privateIpAddress></item>", slices.Contains(i.own, ip), ip)
			} else {
				fmt.Fprintf(&v6, "<item><ipv6Address>%s</ipv6Address></item>", ip)
			}
		}
		fmt.Fprintf(&b, "<item><networkInterfaceId>%s</networkInterfaceId><privateIpAddressesSet>%s</privateIpAddressesSet><ipv6AddressesSet>%s</ipv6AddressesSet></item>",
			id, v4.String(), v6.String())
	}
	b.WriteString("</networkInterfaceSet>")
	if shown > 3 {
		fmt.Fprintf(&b, "<nextToken>%s</nextToken>", next)
	}
	return b.String(), "", ""
}

// signed reports whether the signature is that of the known key.
func signed(r *http.Request, body []byte) bool {
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil {
		return false
	}
	again, err := http.NewRequest(r.Method, "http://"+r.Host+r.URL.Path, strings.NewReader(string(body)))
	if err != nil {
		return false
	}
	_, names, _ := strings.Cut(r.Header.Get("Authorization"), "SignedHeaders=")
	names, _, _ = strings.Cut(names, ",")
	for name := range strings.SplitSeq(names, ";") {
		if v := r.Header.Get(name); v != "" {
			again.Header.Set(name, v)
		}
	}
	who, _ := credentials(r.Context())
	sum := sha256.Sum256(body)
	if v4.NewSigner().SignHTTP(r.Context(), who, again, hex.EncodeToString(sum[:]), "ec2", Region, at) != nil {
		return false
	}
	return again.Header.Get("Authorization") == r.Header.Get("Authorization")
}
