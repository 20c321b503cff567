package aws

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"

	"github.com/egret-project/egret/cloud"
)

const (
	version = "2016-11-15" // of EC2's API
	// mostValues is how many values the filters of one request may have
	// (docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Filtering.html).
	mostValues = 200
	mostAnswer = 32 << 20 // bytes; 200 interfaces with all that EC2 tells of them are some 2 MB
	findLimit  = 10 * time.Second
	// pageLimit is how long one page of a read may take: of 5,000 nodes there are 50 pages and more, of some 0.3 s
	// each.
	pageLimit = 10 * time.Second
)

// Config says which VPC.
type Config struct {
	Region string // empty: as the SDK finds it, at last from the instance that this runs on
	// VPC is the id of the VPC of the nodes: addresses are unique in one alone. Empty: that of the instance.
	VPC string
	// Endpoint is the URL of EC2's API; empty: the region's, or as AWS_ENDPOINT_URL has it.
	Endpoint string
	// Credentials and HTTP are for tests; nil: as the SDK finds them, and a client of its own.
	Credentials aws.CredentialsProvider
	HTTP        *http.Client
}

// EC2 is the cloud of package cloud.
type EC2 struct {
	region, vpc, endpoint string
	credentials           aws.CredentialsProvider
	http                  *http.Client
	signer                *v4.Signer
	pageLimit             time.Duration
}

// New finds out what the Config leaves open, for at most 10 s.
func New(ctx context.Context, cfg Config) (*EC2, error) {
	ctx, cancel := context.WithTimeout(ctx, findLimit)
	defer cancel()
	trustRoots()
	sdk, err := config.LoadDefaultConfig(ctx, config.WithRegion(cfg.Region))
	if err != nil {
		return nil, fmt.Errorf("reading the configuration of AWS: %w", err)
	}
	e := &EC2{
		region: cmp.Or(cfg.Region, sdk.Region), vpc: cfg.VPC,
		credentials: cfg.Credentials, http: cfg.HTTP, signer: v4.NewSigner(),
		pageLimit: pageLimit,
	}
	if e.credentials == nil {
		e.credentials = sdk.Credentials
	}
	if e.http == nil {
		e.http = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		if b, ok := sdk.HTTPClient.(*awshttp.BuildableClient); ok { // which trusts AWS_CA_BUNDLE alone, where that is set
			e.http.Transport = b.GetTransport()
		}
	}
	instance := imds.NewFromConfig(sdk)
	if e.region == "" {
		r, err := instance.GetRegion(ctx, nil)
		if err != nil {
			return nil, fmt.Errorf("asking the instance for its region: %w: give --region", err)
		}
		e.region = r.Region
	}
	if e.vpc == "" {
		if e.vpc, err = vpcOf(ctx, instance); err != nil {
			return nil, fmt.Errorf("asking the instance for its VPC: %w: give --vpc", err)
		}
	}
	e.endpoint = cmp.Or(cfg.Endpoint, aws.ToString(sdk.BaseEndpoint), regional(e.region))
	if u, err := url.Parse(e.endpoint); err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return nil, fmt.Errorf("--endpoint-url %q: want a URL, like %s", e.endpoint, regional("eu-central-1"))
	}
	return e, nil
}

// String names what it speaks to.
func (e *EC2) String() string { return e.vpc + " in " + e.region + " by " + e.endpoint }

func regional(region string) string {
	suffix := "amazonaws.com"
	if strings.HasPrefix(region, "cn-") {
		suffix += ".cn"
	}
	return "https://ec2." + region + "." + suffix + "/"
}

// vpcOf asks the instance for the VPC of its first interface.
func vpcOf(ctx context.Context, instance *imds.Client) (string, error) {
	read := func(path string) (string, error) {
		out, err := instance.GetMetadata(ctx, &imds.GetMetadataInput{Path: path})
		if err != nil {
			return "", err
		}
		defer out.Content.Close()
		b, err := io.ReadAll(io.LimitReader(out.Content, 1<<10))
		return strings.TrimSpace(string(b)), err
	}
	mac, err := read("mac")
	if err != nil {
		return "", err
	}
	return read("network/interfaces/macs/" + mac + "/vpc-id")
}

// interfaces is EC2's answer to DescribeNetworkInterfaces.
type interfaces struct {
	Interfaces []struct {
		ID   string   `xml:"networkInterfaceId"`
		IPv4 []string `xml:"privateIpAddressesSet>item>privateIpAddress"`
		IPv6 []string `xml:"ipv6AddressesSet>item>ipv6Address"`
	} `xml:"networkInterfaceSet>item"`
	Next string `xml:"nextToken"`
}

// Holders returns the network interfaces of the VPC that have the addresses.
func (e *EC2) Holders(ctx context.Context, addresses []netip.Addr) (map[netip.Addr]string, error) {
	out := map[netip.Addr]string{}
	for filter, is4 := range map[string]bool{"addresses.private-ip-address": true, "ipv6-addresses.ipv6-address": false} {
		of := slices.DeleteFunc(slices.Clone(addresses), func(ip netip.Addr) bool { return ip.Is4() != is4 })
		for chunk := range slices.Chunk(of, mostValues) {
			if err := e.holders(ctx, filter, chunk, out); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

func (e *EC2) holders(ctx context.Context, filter string, addresses []netip.Addr, out map[netip.Addr]string) error {
	asked := url.Values{
		"Filter.1.Name": {"vpc-id"}, "Filter.1.Value.1": {e.vpc}, "Filter.2.Name": {filter}, "MaxResults": {"1000"},
	}
	list(asked, "Filter.2.Value", addresses)
	wanted := map[netip.Addr]bool{}
	for _, ip := range addresses {
		wanted[ip] = true
	}
	for {
		page, err := e.page(ctx, asked)
		if err != nil {
			return err
		}
		page.holders(wanted, out)
		if page.Next == "" {
			return nil
		}
		asked.Set("NextToken", page.Next)
	}
}

// holders puts into out which interfaces have the addresses that are wanted.
func (p interfaces) holders(wanted map[netip.Addr]bool, out map[netip.Addr]string) {
	for _, i := range p.Interfaces {
		for _, text := range append(i.IPv4, i.IPv6...) {
			if ip, err := netip.ParseAddr(text); err == nil && wanted[ip] {
				out[ip] = i.ID
			}
		}
	}
}

// page asks for one page of interfaces.
func (e *EC2) page(ctx context.Context, asked url.Values) (out interfaces, err error) {
	ctx, cancel := context.WithTimeout(ctx, e.pageLimit)
	defer cancel()
	err = e.do(ctx, "DescribeNetworkInterfaces", asked, &out)
	return out, err
}

// answer is EC2's to an action that changes something. Older ones say return, newer ones what they did.
type answer struct {
	XMLName xml.Name
	Return  string `xml:"return"`
}

// Assign gives addresses to an interface.
func (e *EC2) Assign(ctx context.Context, iface string, addresses []netip.Addr, move bool) error {
	asked := url.Values{"NetworkInterfaceId": {iface}}
	action := "AssignIpv6Addresses" // which knows no reassignment
	if addresses[0].Is4() {
		action = "AssignPrivateIpAddresses"
		asked.Set("AllowReassignment", strconv.FormatBool(move))
	}
	return e.change(ctx, action, asked, addresses)
}

// Unassign takes addresses from an interface.
func (e *EC2) Unassign(ctx context.Context, iface string, addresses []netip.Addr) error {
	action := "UnassignIpv6Addresses"
	if addresses[0].Is4() {
		action = "UnassignPrivateIpAddresses"
	}
	return e.change(ctx, action, url.Values{"NetworkInterfaceId": {iface}}, addresses)
}

func (e *EC2) change(ctx context.Context, action string, asked url.Values, addresses []netip.Addr) error {
	name := "Ipv6Addresses"
	if addresses[0].Is4() {
		name = "PrivateIpAddress"
	}
	list(asked, name, addresses)
	var a answer
	if err := e.do(ctx, action, asked, &a); err != nil {
		return err
	}
	return a.done(action)
}

// done returns an error where the answer is not that the action was done.
func (a answer) done(action string) error {
	if a.XMLName.Local != action+"Response" || a.Return == "false" {
		return fmt.Errorf("%s: EC2's answer does not say that it was done", action)
	}
	return nil
}

func list(asked url.Values, name string, addresses []netip.Addr) {
	for i, ip := range addresses {
		asked.Set(name+"."+strconv.Itoa(i+1), ip.String())
	}
}

// do asks for an action, and reads the answer.
func (e *EC2) do(ctx context.Context, action string, asked url.Values, out any) error {
	asked.Set("Action", action)
	asked.Set("Version", version)
	body := asked.Encode()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, e.endpoint, strings.NewReader(body))
	if err != nil {
		return fmt.Errorf("%w: asking EC2: %w", cloud.ErrRefused, err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	who, err := e.credentials.Retrieve(ctx)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %s: waiting for credentials of AWS", cloud.ErrNotSent, action)
	}
	if err != nil {
		return fmt.Errorf("%w: no credentials of AWS: %w: see docs/aws.md", cloud.ErrRefused, err)
	}
	sum := sha256.Sum256([]byte(body))
	if err := e.signer.SignHTTP(ctx, who, r, hex.EncodeToString(sum[:]), "ec2", e.region, time.Now()); err != nil {
		return fmt.Errorf("%w: signing a request: %w", cloud.ErrRefused, err)
	}
	// the process may have been stopped
	if end, ok := ctx.Deadline(); ctx.Err() != nil || ok && !time.Now().Before(end) {
		return fmt.Errorf("%w: %s", cloud.ErrNotSent, action)
	}
	resp, err := e.http.Do(r)
	if err != nil {
		return fmt.Errorf("%s: %w", action, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, mostAnswer))
	if err != nil {
		return fmt.Errorf("%s: reading EC2's answer: %w", action, err)
	}
	return decode(action, resp.StatusCode, b, out)
}

// decode reads an answer, or the error that it is.
func decode(action string, status int, b []byte, out any) error {
	if status != http.StatusOK {
		return refusal(action, status, b)
	}
	if err := xml.Unmarshal(b, out); err != nil {
		return fmt.Errorf("%s: reading EC2's answer: %w", action, err)
	}
	return nil
}

// remedies are what to do about an error, by the code that EC2 gives it.
var remedies = map[string]string{
	"PrivateIpAddressLimitExceeded": "the instance type allows no more: say so by the node's annotation " +
		"node.antrea.io/max-egress-ips",
	"UnauthorizedOperation": "docs/aws.md has the IAM policy",
	"AuthFailure":           "see the credentials, and the clock",
	"RequestExpired":        "see the clock",
	"InvalidParameterValue": "want an IP of the subnet of the node's interface that nobody else has: see " +
		"nodeSelector and ranges of its pool",
}

// ofAddress are the codes of refusals that other addresses, or fewer, may not meet.
var ofAddress = []string{"InvalidParameterValue", "PrivateIpAddressLimitExceeded", "InvalidIPAddress.InUse"}

var throttled = []string{
	"RequestLimitExceeded", "Throttling", "ThrottlingException", "RequestThrottled",
	"RequestThrottledException", "TooManyRequestsException", "SlowDown",
}

// refusal returns the error of an answer that is not a success. Of a fault of its own EC2 does not say what it has
// done.
func refusal(action string, status int, body []byte) error {
	var said struct {
		Code    string `xml:"Errors>Error>Code"`
		Message string `xml:"Errors>Error>Message"`
	}
	bad := xml.Unmarshal(body, &said)
	text := fmt.Sprintf("%s: EC2 says %s: %s", action, cmp.Or(said.Code, strconv.Itoa(status)), said.Message)
	if r := remedies[said.Code]; r != "" {
		text += ": " + r
	}
	switch {
	case slices.Contains(throttled, said.Code):
		return fmt.Errorf("%w: %s", cloud.ErrThrottled, text)
	case bad != nil || said.Code == "" || status >= http.StatusInternalServerError:
		return errors.New(text)
	case slices.Contains(ofAddress, said.Code):
		return fmt.Errorf("%w: %s", cloud.ErrAddressRefused, text)
	}
	return fmt.Errorf("%w: %s", cloud.ErrRefused, text)
}
