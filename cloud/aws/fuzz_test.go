package aws

import (
	"bytes"
	"errors"
	"net/http"
	"net/netip"
	"testing"

	"github.com/egret-project/egret/cloud"
)

// Whatever answers at the address of EC2: what it says of addresses that nobody asked for is not taken in, an error is of
// one kind, and nothing but EC2's own answer is a yes.
func FuzzAnswer(f *testing.F) {
	for _, body := range []string{
		`<DescribeNetworkInterfacesResponse><networkInterfaceSet><item><networkInterfaceId>eni-1</networkInterfaceId>` +
			`<privateIpAddressesSet><item><privateIpAddress>10.0.0.50</privateIpAddress></item></privateIpAddressesSet>` +
			`</item></networkInterfaceSet><nextToken>t</nextToken></DescribeNetworkInterfacesResponse>`,
		`<AssignPrivateIpAddressesResponse><return>true</return></AssignPrivateIpAddressesResponse>`,
		`<AssignPrivateIpAddressesResponse><return>false</return></AssignPrivateIpAddressesResponse>`,
		`<Response><Errors><Error><Code>PrivateIpAddressLimitExceeded</Code><Message>m</Message></Error></Errors></Response>`,
		`<Response><Errors><Error><Code>RequestLimitExceeded</Code></Error></Errors></Response>`,
		`<html>`,
	} {
		f.Add(http.StatusOK, []byte(body))
		f.Add(http.StatusBadRequest, []byte(body))
		f.Add(http.StatusBadGateway, []byte(body))
	}
	const action = "AssignPrivateIpAddresses"
	ip := netip.MustParseAddr("10.0.0.50")
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		var page interfaces
		holders := map[netip.Addr]string{}
		if decode(action, status, body, &page) == nil {
			page.holders(map[netip.Addr]bool{ip: true}, holders)
		}
		if _, has := holders[ip]; len(holders) > 1 || len(holders) == 1 && (!has || status != http.StatusOK) {
			t.Errorf("%d %q: holders are %v", status, body, holders)
		}
		var a answer
		err := decode(action, status, body, &a)
		if err == nil {
			err = a.done(action)
		}
		if err == nil && (status != http.StatusOK || !bytes.Contains(body, []byte(action+"Response"))) {
			t.Errorf("%d %q is a yes", status, body)
		}
		throttled, refused := errors.Is(err, cloud.ErrThrottled), errors.Is(err, cloud.ErrRefused)
		if throttled && refused || (throttled || refused) && status == http.StatusOK {
			t.Errorf("%d %q: throttled %t, refused %t: %v", status, body, throttled, refused, err)
		}
	})
}
