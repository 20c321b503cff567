package store

import (
	"net"
	"net/netip"
	"strings"
)

// Endpoint returns an endpoint of etcd, host:port or a URL, with brackets around an IPv6 address that has none: so it
// is where a manifest makes it of $(SERVICE_HOST), which Kubernetes expands to an address. The last number is the port.
// Any other text comes back as it is.
func Endpoint(text string) string {
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok {
		scheme, rest = "", text
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return text
	}
	host, port := rest[:i], rest[i+1:]
	if ip, err := netip.ParseAddr(host); err != nil || !ip.Is6() {
		return text
	}
	if ok {
		scheme += "://"
	}
	return scheme + net.JoinHostPort(host, port)
}
