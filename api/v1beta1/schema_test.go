package v1beta1_test

import (
	"bytes"
	"io/fs"
	"os"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/manifests"
)

// object returns an Egress or ExternalIPPool of YAML; a spec alone becomes one called x.
func object(t *testing.T, kind, text string) *unstructured.Unstructured {
	t.Helper()
	u := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &u.Object); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	if u.GetKind() == "" {
		u.Object = map[string]any{"spec": u.Object}
		u.SetGroupVersionKind(v1beta1.GroupVersion.WithKind(kind))
		u.SetName("x")
	}
	return u
}

// try sends an object to the API server, which neither keeps it nor overlooks a field that it does not know.
func try(t *testing.T, dyn dynamic.Interface, u *unstructured.Unstructured) error {
	t.Helper()
	resource := v1beta1.EgressResource
	if u.GetKind() == "ExternalIPPool" {
		resource = v1beta1.PoolResource
	}
	_, err := dyn.Resource(resource).Create(t.Context(), u, metav1.CreateOptions{DryRun: []string{"All"}, FieldValidation: "Strict"})
	return err
}

// long has n items.
func long(n int, item string) string {
	return "[" + strings.TrimSuffix(strings.Repeat(item+", ", n), ", ") + "]"
}

func TestSchema(t *testing.T) {
	dyn, err := dynamic.NewForConfig(kubetest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Run("the guide's manifests apply", func(t *testing.T) {
		files, err := fs.Glob(manifests.FS, "examples/*.yaml")
		if err != nil || len(files) == 0 {
			t.Fatal(files, err)
		}
		texts := [][]byte{}
		for _, file := range files {
			b, err := fs.ReadFile(manifests.FS, file)
			if err != nil {
				t.Fatal(err)
			}
			texts = append(texts, b)
		}
		guide, err := os.ReadFile("testdata/guide.yaml")
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range append(texts, bytes.Split(guide, []byte("\n---\n"))...) {
			if err := try(t, dyn, object(t, "", string(b))); err != nil {
				t.Errorf("%v\n%s", err, b)
			}
		}
	})
	for kind, tests := range map[string]map[string]struct{ spec, err string }{"Egress": egresses, "ExternalIPPool": pools} {
		for name, tt := range tests {
			t.Run(kind+": "+name, func(t *testing.T) {
				err := try(t, dyn, object(t, kind, tt.spec))
				switch {
				case tt.err == "" && err != nil:
					t.Errorf("refused: %v", err)
				case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
					t.Errorf("got %v, want an error with %q", err, tt.err)
				case tt.err != "" && !apierrors.IsInvalid(err) && !apierrors.IsBadRequest(err):
					t.Errorf("%v is no error of validation", err)
				}
			})
		}
	}
}

// The errors are parts of what the API server says; none: the object is accepted.

var egresses = map[string]struct{ spec, err string }{
	"an egressIP alone":                {"{appliedTo: {}, egressIP: 10.10.0.8}", ""},
	"a pool alone":                     {"{appliedTo: {}, externalIPPool: p}", ""},
	"both":                             {"{appliedTo: {}, egressIP: 10.10.0.8, externalIPPool: p}", ""},
	"neither":                          {"{appliedTo: {}}", "neither egressIP nor externalIPPool is set"},
	"an empty pool beside an egressIP": {"{appliedTo: {}, egressIP: 10.10.0.8, externalIPPool: ''}", ""},
	"an empty pool alone":              {"{appliedTo: {}, externalIPPool: ''}", "neither egressIP nor externalIPPool is set"},
	"an IPv6 address":                  {"{appliedTo: {}, egressIP: '2001:DB8:0::1'}", ""},
	"an empty egressIP":                {"{appliedTo: {}, egressIP: '', externalIPPool: p}", "want an IPv4 or IPv6 address"},
	"no address":                       {"{appliedTo: {}, egressIP: here}", "spec.egressIP: Invalid value: \"here\": want an IPv4 or IPv6 address"},
	"a prefix":                         {"{appliedTo: {}, egressIP: 10.10.0.8/24}", "want an IPv4 or IPv6 address"},
	"an address of 300 characters":     {"{appliedTo: {}, egressIP: '" + strings.Repeat("1", 300) + "'}", "Too long"},
	"loopback":                         {"{appliedTo: {}, egressIP: 127.0.0.1}", "spec.egressIP: Invalid value: \"127.0.0.1\": want a unicast address, neither loopback nor link-local"},
	"link-local":                       {"{appliedTo: {}, egressIPs: ['fe80::1']}", "want a unicast address"},
	"no host's address":                {"{appliedTo: {}, egressIP: 0.0.0.0}", "want a unicast address"},
	"a group's":                        {"{appliedTo: {}, egressIP: 'ff02::1'}", "want a unicast address"},
	"a zone":                           {"{appliedTo: {}, egressIP: 'fe80::1%eth0'}", "want an IPv4 or IPv6 address"},
	"a number":                         {"{appliedTo: {}, egressIP: 10}", "must be of type string"},
	"an unknown field":                 {"{appliedTo: {}, egressIP: 10.10.0.8, egressIp: 10.10.0.8}", `unknown field "spec.egressIp"`},
	"no appliedTo":                     {"{egressIP: 10.10.0.8}", "spec.appliedTo: Required value"},
	"another selector":                 {"{appliedTo: {nodeSelector: {}}, egressIP: 10.10.0.8}", `unknown field "spec.appliedTo.nodeSelector"`},
	"empty selectors":                  {"{appliedTo: {podSelector: {}, namespaceSelector: {}}, egressIP: 10.10.0.8}", ""},
	"a label's value":                  {"{appliedTo: {podSelector: {matchLabels: {a: 'b c'}}}, egressIP: 10.10.0.8}", "should match"},
	"a label's value that is too long": {"{appliedTo: {podSelector: {matchLabels: {a: '" + strings.Repeat("b", 64) + "'}}}, egressIP: 10.10.0.8}", "Too long"},
	"an empty label value":             {"{appliedTo: {podSelector: {matchLabels: {a: ''}}}, egressIP: 10.10.0.8}", ""},
	"an expression's key":              {"{appliedTo: {podSelector: {matchExpressions: [{key: -a, operator: Exists}]}}, egressIP: 10.10.0.8}", `matchExpressions[0].key: Invalid value: "-a": want the name of a label`},
	"an expression's empty key":        {"{appliedTo: {podSelector: {matchExpressions: [{key: '', operator: Exists}]}}, egressIP: 10.10.0.8}", "want the name of a label"},
	"all operators": {`{appliedTo: {podSelector: {matchExpressions: [{key: a, operator: In, values: [b]}, {key: a, operator: NotIn, values: [c, '']},
  {key: a, operator: Exists}, {key: d, operator: DoesNotExist, values: []}]}}, egressIP: 10.10.0.8}`, ""},
	"another operator":        {"{appliedTo: {podSelector: {matchExpressions: [{key: a, operator: Near}]}}, egressIP: 10.10.0.8}", `supported values: "In"`},
	"In without a value":      {"{appliedTo: {namespaceSelector: {matchExpressions: [{key: a, operator: In}]}}, egressIP: 10.10.0.8}", "operator In without values: want one at least"},
	"Exists with a value":     {"{appliedTo: {podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}, egressIP: 10.10.0.8}", `operator Exists with values ["b"]: want none`},
	"Exists with values":      {"{appliedTo: {podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b, c]}]}}, egressIP: 10.10.0.8}", `operator Exists with values ["b" ...]: want none`},
	"an expression's value":   {"{appliedTo: {podSelector: {matchExpressions: [{key: a, operator: In, values: ['b c']}]}}, egressIP: 10.10.0.8}", "should match"},
	"a bandwidth":             {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {rate: 800M, burst: 2G}}", ""},
	"a bandwidth of IEC":      {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {rate: 1Gi, burst: 1e6}}", "must be of type string"},
	"a bandwidth in quotes":   {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {rate: 1Gi, burst: '1e6'}}", ""},
	"no burst":                {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {rate: 800M}}", "spec.bandwidth.burst: Required value"},
	"no rate":                 {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {burst: 800M}}", "spec.bandwidth.rate: Required value"},
	"a rate of no quantity":   {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {rate: fast, burst: 2G}}", "want a quantity above 0"},
	"a rate of 0":             {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {rate: '0', burst: 2G}}", "want a quantity above 0"},
	"a rate in thousandths":   {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {rate: 100m, burst: 2G}}", "spec.bandwidth.rate: Invalid value: \"100m\": want no thousandths: 100m is a tenth, 100M a hundred million"},
	"a part of a unit":        {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {rate: '0.5G', burst: '1.5Gi'}}", ""},
	"a negative burst":        {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {rate: 1M, burst: '-1'}}", "want a quantity above 0"},
	"a rate that is too much": {"{appliedTo: {}, egressIP: 10.10.0.8, bandwidth: {rate: 10E, burst: 2G}}", "want a quantity above 0"},
	"dual stack":              {"{appliedTo: {}, egressIPs: [10.10.0.8, 'fd00::8'], externalIPPools: [p, q]}", ""},
	"plural pools alone":      {"{appliedTo: {}, externalIPPools: [p, q]}", ""},
	"plural of one":           {"{appliedTo: {}, egressIPs: [10.10.0.8]}", ""},
	"empty plurals":           {"{appliedTo: {}, egressIPs: [], externalIPPools: []}", "neither egressIP nor externalIPPool is set"},
	"two of one family":       {"{appliedTo: {}, egressIPs: [10.10.0.8, 10.10.0.9]}", "egressIPs 10.10.0.8 and 10.10.0.9: want at most one of each IP family"},
	"two IPv6 addresses":      {"{appliedTo: {}, egressIPs: ['fd00::8', 'fd00::9']}", "egressIPs fd00::8 and fd00::9: want at most one of each IP family"},
	"three addresses":         {"{appliedTo: {}, egressIPs: [10.10.0.8, 'fd00::8', 'fd00::9']}", "Too many"},
	"one that is none":        {"{appliedTo: {}, egressIPs: [10.10.0.8, '']}", "want an IPv4 or IPv6 address"},
	"a pool twice":            {"{appliedTo: {}, externalIPPools: [p, p]}", "externalIPPools p and p: want two different pools, one of each IP family"},
	"an empty name of a pool": {"{appliedTo: {}, externalIPPools: [p, '']}", "should be at least 1 chars long"},
	"singular and plural IPs": {"{appliedTo: {}, egressIP: 10.10.0.8, egressIPs: ['fd00::8']}", "egressIP 10.10.0.8 beside egressIPs fd00::8: want egressIP and externalIPPool, or egressIPs and externalIPPools, not a mixture"},
	"a singular IP of plural": {"{appliedTo: {}, egressIP: 10.10.0.8, externalIPPools: [p, q]}", "egressIP 10.10.0.8 beside externalIPPools p and q: want egressIP and externalIPPool"},
	"plural IPs of one pool":  {"{appliedTo: {}, egressIPs: [10.10.0.8], externalIPPool: p}", "externalIPPool p beside egressIPs 10.10.0.8: want egressIP and externalIPPool"},
}

var pools = map[string]struct{ spec, err string }{
	"a cidr":                   {"{ipRanges: [{cidr: 10.10.1.0/28}], nodeSelector: {}}", ""},
	"start and end":            {"{ipRanges: [{start: 10.10.1.1, end: 10.10.1.2}, {start: 'fd00::1', end: 'fd00::2'}], nodeSelector: {}}", ""},
	"as many ranges as may be": {"{ipRanges: " + long(1000, "{cidr: 10.10.1.0/28}") + ", nodeSelector: {}}", ""},
	"more ranges":              {"{ipRanges: " + long(1001, "{cidr: 10.10.1.0/28}") + ", nodeSelector: {}}", "Too many"},
	"all three":                {"{ipRanges: [{cidr: 10.10.1.0/28, start: 10.10.1.1, end: 10.10.1.2}], nodeSelector: {}}", "cidr 10.10.1.0/28, start 10.10.1.1, end 10.10.1.2: want a cidr, or a start and an end, not both"},
	"cidr and end":             {"{ipRanges: [{cidr: 10.10.1.0/28, end: 10.10.1.2}], nodeSelector: {}}", "cidr 10.10.1.0/28, end 10.10.1.2: want a cidr, or a start and an end"},
	"a start alone":            {"{ipRanges: [{start: 10.10.1.1}], nodeSelector: {}}", "start 10.10.1.1 without an end: want a cidr, or a start and an end"},
	"nothing":                  {"{ipRanges: [{}], nodeSelector: {}}", "neither cidr nor start and end: want a cidr, or a start and an end"},
	"a cidr of groups":         {"{ipRanges: [{cidr: 224.0.0.0/24}], nodeSelector: {}}", "spec.ipRanges[0].cidr: Invalid value: \"224.0.0.0/24\": want unicast addresses"},
	"a range of loopback":      {"{ipRanges: [{start: 127.0.0.1, end: 127.0.0.9}], nodeSelector: {}}", "spec.ipRanges[0].start: Invalid value: \"127.0.0.1\": want a unicast address"},
	"no cidr":                  {"{ipRanges: [{cidr: 10.10.1.0}], nodeSelector: {}}", "want an address and a prefix length"},
	"an empty cidr":            {"{ipRanges: [{cidr: ''}], nodeSelector: {}}", "want an address and a prefix length"},
	"no end":                   {"{ipRanges: [{start: 10.10.1.1, end: there}], nodeSelector: {}}", "spec.ipRanges[0].end: Invalid value: \"there\": want an IPv4 or IPv6 address"},
	"no ranges":                {"{nodeSelector: {}}", "spec.ipRanges: Required value"},
	"no nodeSelector":          {"{ipRanges: [{cidr: 10.10.1.0/28}]}", "spec.nodeSelector: Required value"},
	"a nodeSelector":           {"{ipRanges: [{cidr: 10.10.1.0/28}], nodeSelector: {matchLabels: {'network/role': egress-gateway}}}", ""},
	"another operator":         {"{ipRanges: [{cidr: 10.10.1.0/28}], nodeSelector: {matchExpressions: [{key: a, operator: Gt, values: ['1']}]}}", `supported values: "In"`},
	"a subnet":                 {"{ipRanges: [{cidr: 10.10.1.0/28}], nodeSelector: {}, subnetInfo: {gateway: 10.10.1.1, prefixLength: 24, vlan: 10}}", ""},
	"an IPv6 subnet":           {"{ipRanges: [{cidr: 'fd00::/64'}], nodeSelector: {}, subnetInfo: {gateway: 'fd00::1', prefixLength: 127}}", ""},
	"no gateway":               {"{ipRanges: [], nodeSelector: {}, subnetInfo: {prefixLength: 24}}", "gateway: Required value"},
	"no prefixLength":          {"{ipRanges: [], nodeSelector: {}, subnetInfo: {gateway: 10.10.1.1}}", "prefixLength: Required value"},
	"a prefixLength of 0":      {"{ipRanges: [], nodeSelector: {}, subnetInfo: {gateway: 10.10.1.1, prefixLength: 0}}", "greater than or equal to 1"},
	"an IPv4 host":             {"{ipRanges: [], nodeSelector: {}, subnetInfo: {gateway: 10.10.1.1, prefixLength: 32}}", "prefixLength 32: want 1 to 31, as the gateway is 10.10.1.1"},
	"an IPv6 host":             {"{ipRanges: [], nodeSelector: {}, subnetInfo: {gateway: 'fd00::1', prefixLength: 128}}", "less than or equal to 127"},
	"a gateway that is none":   {"{ipRanges: [], nodeSelector: {}, subnetInfo: {gateway: here, prefixLength: 24}}", "want an IPv4 or IPv6 address"},
	"vlan 0":                   {"{ipRanges: [], nodeSelector: {}, subnetInfo: {gateway: 10.10.1.1, prefixLength: 24, vlan: 0}}", ""},
	"vlan 4095":                {"{ipRanges: [], nodeSelector: {}, subnetInfo: {gateway: 10.10.1.1, prefixLength: 24, vlan: 4095}}", "less than or equal to 4094"},
	"a negative vlan":          {"{ipRanges: [], nodeSelector: {}, subnetInfo: {gateway: 10.10.1.1, prefixLength: 24, vlan: -1}}", "greater than or equal to 0"},
}
