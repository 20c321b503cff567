// Package admission is the validating webhook of Egress and ExternalIPPool. It checks what the CRDs' schema cannot: an
// object against others.
//
// Every replica of crdsync serves it, leader or not. It owns a Secret, the webhook's CA, which the first replica makes,
// and the caBundle of a ValidatingWebhookConfiguration; the serving certificate is in memory only. It decides nothing
// by itself: crdsync/spec says what is wrong, and the conditions of the egresses report the same of objects that came
// past the webhook.
//
// An update that leaves the spec alone is always allowed, so an object that is wrong already can be labelled and
// deleted. Where the API or etcd cannot be read, the review fails and failurePolicy decides. Two objects that are
// written at the same moment are not checked against each other.
package admission
