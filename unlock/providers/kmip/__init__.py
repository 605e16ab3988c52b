# SPDX-License-Identifier: Apache-2.0
"""The provider `kmip`: keys of a key manager that speaks KMIP 1.1 to 1.4 (OASIS). Never imported in early boot.

    provider        the interface of `unlock.providers`, method by method
      failover      which endpoint is asked, and which error is raised when all fail
      key_operations    what one server is asked, and what follows from its answers
        replacement     which key has replaced which
        key_facts       attributes and key material, read from an answer
        server          one endpoint: its connection, its KMIP version, smaller requests
          breaker       when an endpoint that failed may be asked again
          requests      the requests, as bytes
          answers       which answer belongs to which request item, and what each error means
            failures    errors of the key manager and of TLS as errors of `unlock.errors`
            tls         one TLS connection with a deadline
            ttlv        the encoding of KMIP, written and read
            protocol    numbers of KMIP

A server may lie, lag or have been replaced. Everything that it says is compared with what it was asked. Batch ids are
random, so that an answer to another request never fits.
"""
