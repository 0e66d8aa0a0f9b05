// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"math/rand/v2"
	"slices"
	"strings"
)

// forged is an address that nobody has, for headers that name one.
const forged = "192.0.2.66"

// generated is how many attacks are put together at random where that adds
// something to those that are listed. They are the same in every run.
const generated = 150

// identityHeaders are those that a client may want to write, or have removed.
var identityHeaders = []string{
	"Impersonate-User", "Impersonate-Group", "Impersonate-Uid", "Impersonate-Extra-Scopes", "Impersonate-Something-New", "Authorization",
}

// attacks returns everything that is tried.
func attacks() []attack {
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // it has to be the same in every run
	var all []attack
	add := func(pitfall string, a attack) {
		a.pitfall = pitfall
		all = append(all, a)
	}
	lines := func(pairs ...string) (fields []field) {
		for pair := range slices.Chunk(pairs, 2) {
			fields = append(fields, field{pair[0], pair[1]})
		}
		return fields
	}
	upgrades := [][]field{nil, lines("Upgrade", " websocket", "Sec-WebSocket-Key", " AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version", " 13"), lines("Upgrade", " SPDY/3.1")}

	const connection = "1 Connection names identity headers"
	for _, upgrade := range upgrades {
		for _, name := range identityHeaders {
			for _, spelled := range spellings(name) {
				value := " " + spelled
				if upgrade != nil {
					value += ", Upgrade"
				}
				add(connection, attack{fields: append(lines("Connection", value), upgrade...)})
			}
		}
		add(connection, attack{fields: append(lines("Connection", " Impersonate-User", "Connection", " Impersonate-Group", "Connection", " Upgrade"), upgrade...)})
		add(connection, attack{fields: append(lines("connection", " upgrade ,\tImpersonate-User\t,,Impersonate-Group;q=1"), upgrade...)})
	}
	for range generated {
		var fields []field
		for range 1 + random.IntN(3) {
			var names []string
			for range 1 + random.IntN(4) {
				names = append(names, pick(random, spellings(pick(random, append(identityHeaders, "Upgrade", "Keep-Alive", "Close", "")))))
			}
			separator := pick(random, []string{",", ", ", " ,", "\t,\t", ",,"})
			fields = append(fields, field{pick(random, spellings("Connection")), pick(random, []string{"", " ", "\t"}) + strings.Join(names, separator)})
		}
		add(connection, attack{fields: append(fields, pick(random, upgrades)...)})
	}

	const prefix = "4 Impersonate-* and what is not invented yet"
	for _, name := range append(identityHeaders, "Impersonate-", "Impersonate-Userinfo", "Impersonate-Extra-") {
		for _, spelled := range spellings(name) {
			add(prefix, attack{fields: lines(spelled, " system:masters")})
		}
	}

	const added = "5 the client's groups beside the caller's"
	for _, n := range []int{1, 2, 5} {
		var fields []field
		for range n {
			fields = append(fields, field{"Impersonate-Group", " system:masters"})
		}
		add(added, attack{fields: fields})
		add(added, attack{fields: append(fields, field{"Impersonate-User", " system:admin"})})
		add(added, attack{method: "POST", body: "{}", fields: append(fields, field{"Connection", " Impersonate-Group"})})
	}

	const extra = "6 extra keys"
	for _, key := range []string{"scopes", "SCOPES", "a%2Fb", "a.b", "a_b", "example.com%2fscopes", "%00", "a%0d%0aImpersonate-User"} {
		add(extra, attack{fields: lines("Impersonate-Extra-"+key, " x")})
	}

	const values = "7 values that are cut, folded or split"
	for _, value := range []string{
		"a\rImpersonate-Group: system:masters", "a\nImpersonate-Group: system:masters", "a\r\n Impersonate-Group: system:masters",
		"a\x00b", " \t system:admin \t ", "a,system:masters", "sýstem:admin", "", "a\x7fb",
	} {
		for _, name := range []string{"Impersonate-User", "Impersonate-Group", "X-Any"} {
			add(values, attack{fields: lines(name, " "+value), only: http1})
		}
		add(values, attack{fields: lines("impersonate-user", value), only: http2})
	}
	add(values, attack{fields: lines("Impersonate-User ", " system:admin"), only: http1})
	add(values, attack{fields: lines(" Impersonate-User", " system:admin"), only: http1})

	const aliases = "8 underscores and dots for hyphens"
	for _, name := range identityHeaders {
		for _, alias := range []string{strings.ReplaceAll(name, "-", "_"), strings.ReplaceAll(name, "-", "."), strings.Replace(name, "-", "_", 1)} {
			for _, spelled := range spellings(alias) {
				add(aliases, attack{fields: lines(spelled, " system:masters")})
			}
		}
	}

	const frontProxy = "9 X-Remote-*"
	for _, name := range []string{"X-Remote-User", "X-Remote-Group", "X-Remote-Extra-Scopes", "X_Remote_User", "X.Remote.Group"} {
		for _, spelled := range spellings(name) {
			add(frontProxy, attack{fields: lines(spelled, " system:masters")})
		}
	}

	const credentials = "10 credentials of the client's own"
	for _, spelled := range spellings("Authorization") {
		add(credentials, attack{fields: lines(spelled, " Bearer stolen")})
		add(credentials, attack{fields: lines(spelled, " Basic c3RvbGVuOnN0b2xlbg==", spelled, " Bearer stolen")})
	}
	const bearer = "base64url.bearer.authorization.k8s.io.c3RvbGVu"
	for _, protocols := range []string{bearer, "v4.channel.k8s.io, " + bearer, bearer + ",v5.channel.k8s.io", "a," + strings.ToUpper(bearer) + ",b"} {
		for _, spelled := range spellings("Sec-WebSocket-Protocol") {
			add(credentials, attack{fields: append(lines(spelled, " "+protocols, "Connection", " Upgrade"), upgrades[1]...)})
		}
	}

	const forwarding = "11 addresses that the client makes up"
	for _, name := range []string{"X-Forwarded-For", "X-Real-Ip", "X_Forwarded_For", "X-Forwarded-Host", "Audit-Id"} {
		for _, spelled := range spellings(name) {
			add(forwarding, attack{fields: lines(spelled, " "+forged)})
		}
	}
	add(forwarding, attack{fields: lines("Forwarded", " for="+forged, "X-Forwarded-For", " "+forged+", "+forged)})
	add(forwarding, attack{fields: lines("X-Forwarded-For", " "+forged, "Connection", " X-Forwarded-For")})

	const framing = "13 trailers, Expect, targets and hosts"
	add(framing, attack{method: "POST", trailer: true, fields: lines("Trailer", " Impersonate-User, Authorization"), only: http1,
		body: "2\r\n{}\r\n0\r\nImpersonate-User: system:admin\r\nAuthorization: Bearer stolen\r\n\r\n"})
	add(framing, attack{method: "POST", body: "{}", fields: lines("Expect", " 100-continue", "Connection", " Impersonate-User, Expect"), only: http1})
	for _, target := range []string{"http://%h%s", "https://%h%s", "http://other.example%s", "//other.example%s"} {
		add(framing, attack{target: target, fields: lines("Connection", " Impersonate-User"), only: http1})
	}
	add(framing, attack{fields: lines("Host", " other.example"), only: http1, refused: true})
	add(framing, attack{method: "POST", fields: lines("Content-Length", " 0", "Transfer-Encoding", " chunked", "Connection", " Impersonate-User"), body: "0\r\n\r\n", only: http1})
	add(framing, attack{fields: lines("te", "trailers", "trailer", "impersonate-user"), only: http2})
	add(framing, attack{fields: lines("Impersonate-User", "system:admin", "impersonate-user", "system:admin"), only: http2})

	const pages = "20a web pages"
	for _, method := range []string{"GET", "POST"} {
		for _, origin := range []string{"https://evil.example", "null", "", "http://localhost:8080"} {
			add(pages, attack{method: method, fields: lines("Origin", " "+origin), refused: true})
		}
		for _, site := range []string{"cross-site", "same-site", "nonsense"} {
			add(pages, attack{method: method, fields: lines("Sec-Fetch-Site", " "+site), refused: true})
		}
		add(pages, attack{method: method, fields: append(lines("Origin", " https://evil.example", "Connection", " Upgrade"), upgrades[1]...), refused: true})
	}

	const connect = "20c CONNECT"
	add(connect, attack{method: "CONNECT", refused: true})
	add(connect, attack{method: "CONNECT", target: "%h", refused: true, only: http1})
	add(connect, attack{method: "CONNECT", fields: lines("connection", " Upgrade", "upgrade", " websocket"), refused: true, only: http1})
	add(connect, attack{method: "CONNECT", fields: lines(":protocol", "websocket"), refused: true, only: http2})

	const unknown = "21 upgrades to anything, identity taken along"
	for _, upgrade := range []string{"h2c", "TLS/1.0", "websocket, h2c", "foo", "SPDY/3"} {
		add(unknown, attack{fields: lines("Connection", " Upgrade, Impersonate-User, HTTP2-Settings", "Upgrade", " "+upgrade, "HTTP2-Settings", " AAMAAABkAAQAoAAAAAIAAAAA")})
	}

	const spelled = "28 paths spelled differently"
	for _, path := range []string{"/%2e%2e/secrets", "//x", "/./x", "/secrets%2Fname", "/%65xec", "/x/", "/%zz", "/..%2f..%2fapi", "/x;y", "/\\x"} {
		add(spelled, attack{path: path, fields: lines("Connection", " Impersonate-User")})
	}

	const mixed = "all of it at random"
	for range generated {
		var fields []field
		for range 1 + random.IntN(5) {
			other := pick(random, all)
			if !other.refused && other.only == "" {
				fields = append(fields, other.fields...)
			}
		}
		random.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
		add(mixed, attack{method: pick(random, []string{"GET", "POST", "DELETE", "PATCH"}), fields: fields})
	}
	return all
}

// spellings returns a name in several cases.
func spellings(name string) []string {
	mixed := []byte(strings.ToLower(name))
	for i := 0; i < len(mixed); i += 2 {
		mixed[i] = strings.ToUpper(string(mixed[i]))[0]
	}
	return []string{name, strings.ToLower(name), strings.ToUpper(name), string(mixed)}
}

func pick[T any](random *rand.Rand, from []T) T { return from[random.IntN(len(from))] }
