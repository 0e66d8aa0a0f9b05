// SPDX-License-Identifier: Apache-2.0

package main

// written are the lines that limit what a client makes the proxy write, and what it tells
// clients.
var written = []file{
	{"internal/clip/clip.go", "./internal/clip", []mutant{
		{name: "what a client writes is cut", old: "left < 0 {", new: "left < -1<<30 {"},
		{name: "what is escaped is as long as it gets", old: "\t\treturn maxEscaped\n", new: "\t\treturn 1\n"},
		{name: "only so many values are written", old: "\t\tif i == most {", new: "\t\tif i == -1 {"},
	}},
	{"internal/apistatus/log.go", "./internal/apistatus", []mutant{
		{name: "a caller's refusals are not all logged", old: "\tif !l.Allows(r) {", new: "\tif !l.Allows(r) && false {"},
		{name: "a caller is an address and not a connection", old: "caller := remote.Addr().Unmap()", new: "caller := netip.AddrFrom4([4]byte{10, 0, byte(remote.Port() >> 8), byte(remote.Port())})"},
		{name: "so many callers are counted", old: "!counted && len(l.refused) >= maxCallers {", new: "!counted && false {"},
		{name: "what was not logged is said", old: "\t\tl.end = time.AfterFunc(period, l.Flush)\n", new: "\t\tl.end = time.AfterFunc(period, func() {})\n"},
		{name: "a method in the log is cut", old: "clip.String(r.Method)", new: "r.Method"},
		{name: "a host in the log is cut", old: "clip.String(r.Host)", new: "r.Host"},
		{name: "a URI in the log is cut", old: `clip.String(cmp.Or(r.RequestURI, r.URL.RequestURI()))`, new: `cmp.Or(r.RequestURI, r.URL.RequestURI(), clip.String(""))`},
		{name: "the log has causes", old: "cause != nil {", new: "cause != nil && false {"},
	}},
	{"internal/apistatus/cause.go", "./internal/apistatus", []mutant{
		{name: "an error's message has no cause", old: "return c.refusal.Error() }", new: `return c.refusal.Error() + ": " + c.cause.Error() }`},
	}},
	{"internal/apistatus/apistatus.go", "./internal/apistatus", []mutant{
		{name: "a client that is gone is no error", old: "\t_, _ = w.Write(a.body)\n\treturn nil\n", new: "\t_, err = w.Write(a.body)\n\treturn err\n"},
	}},
	{"internal/transport/transport.go", "./internal/transport", []mutant{
		{name: "callers are not told why there is no cluster", old: "of the cluster; its log says why\")))", new: "of the cluster; its log says why: %v\", t.unusable)))"},
		{name: "callers are not told why there are no credentials", old: "for the cluster; its log says why\")))", new: "for the cluster; its log says why: %v\", err)))"},
		{name: "callers are not told why credentials cannot be renewed", old: "the proxy's log says why\")))", new: "the proxy's log says why: %v\", stale)))"},
	}},
	{"internal/authn/authn.go", "./internal/authn", []mutant{
		{name: "callers are not told why a node does not answer", old: "the proxy's log says why\", k.node.Name, k.remote))", new: "the proxy's log says why: %v\", k.node.Name, k.remote, err))"},
	}},
	{"internal/authn/checks.go", "./internal/authn", []mutant{
		{name: "callers are not told why a node does not say its name", old: "the proxy's log says why\", node.Name, clip.String(r.Host)))", new: "the proxy's log says why: %v\", node.Name, clip.String(r.Host), err))"},
	}},
	{"internal/accessreview/accessreview.go", "./internal/accessreview", []mutant{
		{name: "callers are not told why a review fails", old: "the proxy's log says why\", q.Caller.User, clip.String(q.Target.User)))", new: "the proxy's log says why: %v\", q.Caller.User, clip.String(q.Target.User), err))"},
		{name: "a long path is not reviewed", old: "\tif tooLong(q.Request) {", new: "\tif tooLong(q.Request) && false {"},
	}},
	{"internal/accessreview/length.go", "./internal/accessreview", []mutant{
		{name: "a path has a length", old: " || len(i.Path) > maxAttribute", new: ""},
		{name: "a namespace has a length", old: "len(i.Namespace), ", new: ""},
		{name: "a name has a length", old: ", len(i.Name))", new: ")"},
		{name: "a resource has a length", old: "len(i.Resource), ", new: ""},
		{name: "a subresource has a length", old: "len(i.Subresource), ", new: ""},
		{name: "a group has a length", old: "len(i.APIGroup), ", new: ""},
		{name: "a version has a length", old: "len(i.APIVersion), ", new: ""},
	}},
	{"internal/apievents/apievents.go", "./internal/apievents", []mutant{
		{name: "an event has so many parameters", old: "\t\tif left <= 0 {", new: "\t\tif false {"},
		{name: "an event has a part of the query", old: "clipQuery(r.URL.Query())", new: "r.URL.Query()"},
		{name: "an event has so many parts of the path", old: "clip.Strings(info.Parts, maxValues)", new: "info.Parts"},
		{name: "an event's path is cut", old: "clip.String(info.Path)", new: "info.Path"},
		{name: "a line's URI is cut", old: `zap.String("uri", clip.String(r.URL.String()))`, new: `zap.String("uri", r.URL.String())`},
		{name: "a line has a part of the groups to act as", old: "clip.Strings(actAs.Target.Groups, maxValues)", new: "actAs.Target.Groups"},
	}},
	{"internal/whoami/sites.go", "./internal/whoami", []mutant{
		{name: "a site has a short URL", old: " || len(f.Server) > maxServer {", new: " {"},
	}},
	{"caddyfile/guard.go", "./caddyfile", []mutant{
		{name: "a proxy in front of the handler is seen", old: "\t\tg.missing = g.missing || plain && !passed\n\tcase \"invoke\":", new: "\t\t_ = plain\n\tcase \"invoke\":"},
		{name: "a proxy in an earlier route is seen", old: "\t\tg.missing = g.missing || plain && !passed\n\tcase *caddyhttp.Invoke:", new: "\t\t_ = plain\n\tcase *caddyhttp.Invoke:"},
		{name: "a proxy for errors is seen", old: "\tif g.server.Errors != nil {", new: "\tif false {"},
		{name: "a handler on a path guards only that", old: "\t\tcase matchers != \"\":\n\t\t\tguarded[matchers] = here\n", new: "\t\tcase matchers != \"\":\n\t\t\tpassed = here\n"},
		{name: "a handler in a group may be left out", old: " && r.Group == \"\":", new: ":"},
	}},
}
